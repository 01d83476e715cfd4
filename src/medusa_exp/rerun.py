"""Doing a run again: its saved config into a new run directory, and both runs' numbers beside it.

What a later call of the old run changed is not done again: it is its first call that counts.
"""

import math
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table

from medusa_exp import continuation
from medusa_exp.config import load_saved
from medusa_exp.errors import UserError
from medusa_exp.files import read_json, write_json
from medusa_exp.metric_names import is_timed

COMPARISON = "rerun.json"
_OURS = ("experiment", "rerun.source", "run_dir", "sweep_dir")
"""Keys of the new call that say how it is made, not what is done."""


def source_config(composed: DictConfig, hydra_config: HydraConf) -> DictConfig:
    """Return the config of the run that `rerun.source` names, new overrides on top of it.

    Raises:
        UserError: there is no such run, or today's schema does not know its config.
    """
    source = Path(composed.rerun.source).expanduser()
    if not (source / continuation.SAVED).is_file():
        raise UserError(f"rerun.source={source} is no run directory: it has no .hydra/config.yaml.")
    config = load_saved(source / continuation.SAVED)
    # As they were written: a list of OmegaConf's would resolve ${oc.env:...} as it is walked.
    given: list[str] = OmegaConf.to_container(hydra_config.overrides.task)  # type: ignore
    keys = [key for key in map(continuation.key_of, given) if key not in _OURS]
    continuation.overlay(config, composed, [*keys, "rerun"])
    return config


def compare(source: Path, out: Path) -> dict[str, Any]:
    """Write both runs' numbers to `rerun.json` in the run directory `out`, and return them.

    Raises:
        UserError: a file is not valid JSON.
    """
    old, new = (read_json(place / "metrics.json", {}) for place in (source, out))
    metrics = {name: [old.get(name), new.get(name)] for name in sorted({*old, *new})}
    runs = [read_json(place / "run.json", {}) for place in (source, out)]
    provenance = [_provenance(run) for run in runs]
    found = {
        "source": str(source),
        "metrics": metrics,
        "differing": [
            name
            for name, (a, b) in metrics.items()
            if None not in (a, b) and a != b and not is_timed(name)
        ],
        "only_one_has": [name for name, pair in metrics.items() if None in pair],
        "provenance": {
            name: [one.get(name) for one in provenance]
            for name in sorted({*provenance[0], *provenance[1]})
            if provenance[0].get(name) != provenance[1].get(name)
        },
    }
    write_json(out / COMPARISON, found)
    return found


def print_comparison(found: dict[str, Any]) -> None:
    """Print both runs' numbers side by side, and what else is not the same."""
    console = Console()
    table = Table(Column("figure", overflow="fold"), "then", "now", "")
    for name, (old, new) in found["metrics"].items():
        table.add_row(name, _shown(old), _shown(new), _verdict(name, old, new))
    console.print(table)
    for name, (old, new) in found["provenance"].items():
        console.print(f"not the same: {name}: {old} then, {new} now", soft_wrap=True)
    if found["differing"]:
        console.print(f"differing, and not by the clock: {', '.join(found['differing'])}")
    elif is_equal_in_something(found):
        console.print("equal in all that the clock does not give")
    else:
        console.print("no figure of both runs can be compared")
    if missing := found["only_one_has"]:
        console.print(f"figures that only one of them has: {len(missing)}")


def is_equal_in_something(found: dict[str, Any]) -> bool:
    """Say whether there is a figure that both runs have, and that no clock gives."""
    shared = found["metrics"].keys() - set(found["only_one_has"])
    return not found["differing"] and not all(map(is_timed, shared))


def _provenance(run: dict[str, Any]) -> dict[str, Any]:
    git = run.get("git", {})
    return {
        "commit": git.get("commit"),
        "uncommitted changes": git.get("dirty"),
        "device": run.get("device"),
        **run.get("versions", {}),
        "data": sorted(run.get("data", {}).values()),
        **run.get("cache_keys", {}),
    }


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _verdict(name: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return "only one has it"
    if old == new:
        return "equal"
    ratio = f"{new / old:.3f} of it" if old and math.isfinite(new / old) else "differs"
    return f"{ratio} (timed)" if is_timed(name) else ratio
