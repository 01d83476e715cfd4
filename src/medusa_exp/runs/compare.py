"""Doing a run again: its saved config into a new run directory, then both runs' numbers compared.

It is the old run's first call that is done again. Where a later call (stages=[evaluate]
run_dir=...) has replaced some of its numbers, what is printed says so: they may differ for that.
"""

import math
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table

from medusa_exp.config import continuation, load_saved
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.metric_table import is_timed

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

    `differing` names the metrics that differ although they depend on no clock (see `is_timed`).
    Those of decoding over a tree may do so if `is_other_tree`: timing chooses a calibrated one.

    Raises:
        UserError: a file is not valid JSON.
    """
    old, new = (read_json(place / "metrics.json", {}) for place in (source, out))
    metrics = {name: [old.get(name), new.get(name)] for name in sorted({*old, *new})}
    runs = [read_json(place / "run.json", {}) for place in (source, out)]
    trees = [read_json(place / "tree.json") for place in (source, out)]
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
        "is_other_tree": None not in trees and trees[0] != trees[1],
        "later_calls": sorted(path.name for path in source.glob(".hydra-*")),
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
    table = Table(Column("metric", overflow="fold"), "then", "now", "now / then")
    for name, (old, new) in found["metrics"].items():
        table.add_row(name, _shown(old), _shown(new), _verdict(name, old, new))
    console.print(table)
    for name, (old, new) in found["provenance"].items():
        console.print(f"not the same: {name}: {old} then, {new} now", soft_wrap=True)
    if found["differing"]:
        console.print(f"different, and not because of timing: {', '.join(found['differing'])}")
    elif is_equal_in_something(found):
        console.print("equal in every metric that does not depend on timing")
    else:
        console.print("the two runs share no metric that can be compared")
    if found["is_other_tree"]:
        console.print(
            "decoded over another tree than then (timing chooses a calibrated one): what was "
            "accepted may differ for that",
            soft_wrap=True,
        )
    if missing := found["only_one_has"]:
        console.print(f"metrics that only one of them has: {len(missing)}")
    if found["later_calls"]:
        console.print(
            f"{found['source']} was called again later, and its numbers may be of those calls "
            f"({', '.join(found['later_calls'])}); done again was the first one",
            soft_wrap=True,
            markup=False,
        )


def is_equal_in_something(found: dict[str, Any]) -> bool:
    """Say whether both runs have a metric that depends on no clock, and all such are equal."""
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
    ratio = f"{new / old:.3f}" if old and math.isfinite(new / old) else "differs"
    return f"{ratio} (timed)" if is_timed(name) else ratio
