"""Two runs' numbers side by side.

    python -m medusa_exp.runs.compare OLD NEW        two run directories

`+experiment=rerun rerun.source=OLD` does a run again, the first call of it, and ends with this: see
`config/continuation.py` for where its config comes from.
"""

import math
import sys
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from medusa_exp.errors import UserError, as_program
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.list import saved_config, wide_console
from medusa_exp.runs.metric_table import is_timed
from medusa_exp.runs.record import check_record

Found = dict[str, Any]

_OF_PLACES = ("run_dir", "sweep_dir", "cache_dir", "rerun.", "logger.")
"""How keys begin that say where things go, and nothing of what a run finds."""
_MOST_SETTINGS = 30
"""That are printed."""


def compare(old: Path, new: Path) -> Found:
    """Return the numbers of both runs and what else is not the same, as `rerun.json` has it.

    `differing` names the metrics that differ although no clock decides them (`Metric.is_timed`).
    Those of decoding over a tree may do so if `is_other_tree`: timing chooses a calibrated one.

    Raises:
        UserError: a file is not valid JSON.
    """
    for run in (old, new):
        check_record(run)
    metrics = _pairs(*(read_json(run / "metrics.json", {}) for run in (old, new)))
    both = {name: pair for name, pair in metrics.items() if None not in pair}
    trees = [read_json(run / "tree.json") for run in (old, new)]
    made_of = _pairs(*(_made_of(read_json(run / "run.json", {})) for run in (old, new)))
    formats = [read_json(run / "data.json", {}).get("format") for run in (old, new)]
    for name in ("dataset", "tokenised", "regenerated") if formats[0] != formats[1] else ():
        made_of.pop(name, None)  # keys of the same data differ from format to format
    return {
        "source": str(old),
        "metrics": metrics,
        "differing": [name for name, (a, b) in both.items() if a != b and not is_timed(name)],
        "only_one_has": [name for name in metrics if name not in both],
        "is_other_tree": None not in trees and trees[0] != trees[1],
        "later_calls": sorted(path.name for path in old.glob(".hydra-*")),
        "provenance": {name: pair for name, pair in made_of.items() if pair[0] != pair[1]},
        "settings": _other_settings(*map(saved_config, (old, new))),
    }


def _other_settings(old: Found, new: Found) -> dict[str, list[Any]]:
    """Return the keys whose values differ; one that only one has is of another version."""
    then, now = (
        {k: v for k, v in _flat(one).items() if not k.startswith(_OF_PLACES)} for one in (old, new)
    )
    return {key: [then[key], now[key]] for key in then if key in now and then[key] != now[key]}


def _flat(section: Found, before: str = "") -> Found:
    """Return the values of a section under their dotted keys."""
    found: Found = {}
    for key, value in section.items():
        is_section = isinstance(value, dict) and value
        found |= _flat(value, f"{before}{key}.") if is_section else {f"{before}{key}": value}
    return found


def _pairs(old: Found, new: Found) -> dict[str, list[Any]]:
    return {name: [old.get(name), new.get(name)] for name in sorted({*old, *new})}


def compare_with_source(source: str | None, out: Path) -> None:
    """Compare the run in `out` with the one it does again, if any: in `rerun.json`, and printed."""
    if source is not None:
        found = compare(Path(source).expanduser(), out)
        write_json(out / "rerun.json", found)
        print_comparison(found)


def print_comparison(found: Found) -> None:
    """Print both runs' numbers side by side, and what else is not the same."""
    console = wide_console()
    table = Table(Column("metric", overflow="fold"), "then", "now", "now / then")
    for name, (old, new) in found["metrics"].items():
        shown = ("" if value is None else f"{value:.6g}" for value in (old, new))
        table.add_row(name, *shown, _ratio(name, old, new))
    console.print(table)
    for line in _remarks(found):
        console.print(line, soft_wrap=True, markup=False)


def _remarks(found: Found) -> list[str]:
    provenance = found["provenance"].items()
    lines = [f"not the same: {name}: {old} then, {new} now" for name, (old, new) in provenance]
    settings = [f"{key}: {old} then, {new} now" for key, (old, new) in found["settings"].items()]
    lines += [f"set otherwise: {setting}" for setting in settings[:_MOST_SETTINGS]]
    if len(settings) > _MOST_SETTINGS:
        lines.append(f"set otherwise: {len(settings) - _MOST_SETTINGS} more keys")
    shared = found["metrics"].keys() - set(found["only_one_has"])
    if found["differing"]:
        lines.append(f"different, and not because of timing: {', '.join(found['differing'])}")
    elif all(map(is_timed, shared)):
        lines.append("the two runs share no metric that can be compared")
    else:
        lines.append("equal in every metric that does not depend on timing")
    if found["is_other_tree"]:
        lines.append(
            "decoded over another tree than then (timing chooses a calibrated one): what was "
            "accepted may differ for that"
        )
    if missing := found["only_one_has"]:
        lines.append(f"metrics that only one of them has: {len(missing)}")
    if calls := found["later_calls"]:
        lines.append(
            f"{found['source']} was called again later ({', '.join(calls)}), and its numbers may "
            "be of those calls: a run done again is its first call"
        )
    return lines


def _made_of(run: Found) -> Found:
    git = run.get("git", {})
    return {
        "commit": git.get("commit"),
        "uncommitted changes": git.get("dirty"),
        "device": run.get("device"),
        **run.get("versions", {}),
        "data": sorted(run.get("data", {}).values()),
        **run.get("cache_keys", {}),
    }


def _ratio(name: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return "only one has it"
    if old == new:
        return "equal"
    ratio = f"{new / old:.3f}" if old and math.isfinite(new / old) else "differs"
    return f"{ratio} (timed)" if is_timed(name) else ratio


def main(arguments: list[str]) -> None:
    """Run as a program."""
    if len(arguments) != 2:
        sys.exit("give two run directories: python -m medusa_exp.runs.compare OLD NEW")
    with as_program():
        for run in map(Path, arguments):
            if not (run / "metrics.json").is_file():
                raise UserError(f"{run} is no run directory: it has no metrics.json.")
        found = compare(*map(Path, arguments))
        print("then: {}\nnow: {}".format(*arguments))
        print_comparison(found)


if __name__ == "__main__":
    main(sys.argv[1:])
