"""All runs at a glance.

    python -m medusa_exp.runs.list [outputs]           a table, the newest run first
    python -m medusa_exp.runs.list --status failed --experiment 'quick*' --json

What the run directories' own files say, and nothing else, is shown; a directory that cannot be read
is a row with the reason.
"""

import argparse
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from medusa_exp.config.trust import load_yaml
from medusa_exp.errors import UserError, as_program
from medusa_exp.runs.files import read_json
from medusa_exp.runs.jobs import JOB
from medusa_exp.runs.processes import is_process_alive
from medusa_exp.runs.record import FAILURE

STATUSES = ("done", "running", "stopped", "failed", "malformed")
QUIET = timedelta(minutes=10)
"""A stage that says that it runs, and has written nothing for so long, is taken for stopped."""
_OF_A_RUN = ("run.json", ".hydra/config.yaml")
_SORTS: dict[str, Callable[["Run"], Any]] = {
    "when": lambda run: run.when,
    "tokens_per_step": lambda run: run.tokens_per_step or 0.0,
    "speedup": lambda run: run.speedup or 0.0,
    "size": lambda run: run.bytes,
}


@dataclass
class Run:
    """What is known of a run directory."""

    path: str
    when: str = ""
    """When it began, ISO 8601, UTC; of a directory without that, when it was last written."""
    experiment: str = ""
    model: str = ""
    heads: str = ""
    """Kind and number, as medusa x5."""
    status: str = "malformed"
    """One of `STATUSES`."""
    reason: str = ""
    """Why it is not done."""
    tokens_per_step: float | None = None
    speedup: float | None = None
    identical: float | None = None
    """Share of answers that are plain decoding's."""
    bytes: int = 0
    """On disk; a file with several names counts once."""
    cache_keys: dict[str, list[str]] = field(default_factory=dict)
    """Kind of cache entry -> names of those that the run is made of."""


def read_runs(root: Path) -> list[Run]:
    """Return a row for each run directory under `root`, the newest first.

    Raises:
        UserError: there is no such directory.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no directory: name the one that your runs are in.")
    found = [read_run(path) for path in run_directories(root)]
    return sorted(found, key=lambda run: (run.when, run.path), reverse=True)


def run_directories(root: Path) -> Iterator[Path]:
    """Yield the run directories under `root`, itself perhaps; links are not followed."""
    for folder, folders, _ in os.walk(root):
        if any(os.path.lexists(Path(folder, name)) for name in _OF_A_RUN):
            folders.clear()  # what lies inside belongs to it
            yield Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def read_run(path: Path) -> Run:
    """Return what a run directory says of itself; never an error."""
    run = Run(str(path))
    try:
        run.bytes, newest = size_and_newest(path)
        run.when = newest.isoformat(timespec="seconds")
        _read_files(run, path, newest)
    except Exception as error:  # whatever lies there, the others are to be shown
        run.status, run.reason = "malformed", f"{' '.join(str(error).split()) or type(error)}"
    return run


def _read_files(run: Run, path: Path, newest: datetime) -> None:
    record, metrics = (read_json(path / name, {}) for name in ("run.json", "metrics.json"))
    config = saved_config(path)
    stages = record.get("stages", {})
    run.when = _time(record["created"]) if "created" in record else run.when
    run.experiment = str(record.get("name") or config.get("name") or path.parent.name)
    run.model = _model(config.get("model", {}))
    run.heads = _heads(path / "heads" / "config.json")
    names = ("tokens_per_step", "speedup", "identical_fraction")
    run.tokens_per_step, run.speedup, run.identical = (metrics.get(f"eval/{n}") for n in names)
    run.cache_keys = _cache_keys(record, read_json(path / "regenerated.json", {}))
    wanted = config.get("stages", [])
    run.status, run.reason = _status(stages, wanted, datetime.now(UTC) - newest)
    if not stages and (error := _failure(path)):
        run.status, run.reason = "failed", f"{_before(wanted, stages)}: {' '.join(error.split())}"


def _failure(path: Path) -> str | None:
    """Return why no stage began: by job.json where a sweep ran it, else by its failure.json.

    None if neither says.
    """
    job = read_json(path / JOB, {})
    found = job if job.get("status") == "failed" else read_json(path / FAILURE, {})
    # Where a job of a sweep is tried again, what its last try met is over.
    return None if job.get("status") == "running" else found.get("error")


def _status(stages: dict[str, Any], wanted: Any, quiet: timedelta) -> tuple[str, str]:
    """Return the status of a run by those of its stages, and why it is not done.

    `quiet` is for how long nothing has been written: a killed process notes no end. A stage that
    the run itself does not ask for counts until another has been done after it.
    """
    names = [str(name) for name in wanted] if isinstance(wanted, list) else []
    seems_alive, since = quiet < QUIET, f"nothing written for {_span(quiet)}"
    for name, entry in stages.items():
        status, process = entry.get("status"), str(entry.get("process", ""))
        is_alive = is_process_alive(process) if process else None
        if status == "running" and (seems_alive if is_alive is None else is_alive):
            return "running", name
        if name not in names and _is_past(entry, stages):
            continue
        if status == "failed":
            return "failed", f"{name}: {' '.join(str(entry.get('error', '')).split())}"
        if status == "interrupted" or is_alive is False:
            return "stopped", f"in stage {name}"
        if status == "running":
            return "stopped", f"in stage {name}, {since}"
    if not stages or any(name not in stages for name in names):
        before = _before(wanted, stages)
        return ("running", "") if seems_alive else ("stopped", f"{before}, {since}")
    return "done", ""


def _before(wanted: Any, stages: dict[str, Any]) -> str:
    """Return in words which stage of those that are wanted is the next."""
    names = wanted if isinstance(wanted, list) else []
    left = [name for name in map(str, names) if name not in stages]
    return f"before stage {left[0]}" if left else "before its first stage"


def _is_past(entry: dict[str, Any], stages: dict[str, Any]) -> bool:
    """Has another stage begun after this one, and been done?"""
    began = str(entry.get("began", ""))
    ends = (str(one.get("began", "")) for one in stages.values() if one.get("status") == "done")
    return bool(began) and any(other > began for other in ends)


def _span(time: timedelta) -> str:
    days, hours = time.days, time.seconds // 3600
    return f"{days} days" if days > 1 else f"{24 * days + hours} h" if hours else "minutes"


def saved_config(run: Path) -> dict[str, Any]:
    """Return the config of a run's first call as it is written; its references are not followed."""
    path = run / ".hydra" / "config.yaml"
    if not path.is_file():
        return {}
    found: Any = OmegaConf.to_container(load_yaml(path), resolve=False)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no config.")
    return found


def _model(section: Any) -> str:
    """Return a model's name: on the hub, or of its directory."""
    section = section if isinstance(section, dict) else {}
    path = section.get("path")
    if not path:
        return "tiny" if section.get("kind") == "tiny" else ""
    if "${" in str(path):
        return "demo" if "medusa_exp.demo" in str(path) else str(path)
    place = Path(str(path))
    is_name = len(place.parts) == 2 and not str(path).startswith((".", "~", "/"))
    is_on_hub = is_name and not place.exists()
    return str(path) if is_on_hub else place.name


def _heads(path: Path) -> str:
    config = read_json(path, {}, kind=dict[str, Any])
    return f"{config.get('kind', '?')} x{config.get('num_heads', '?')}" if config else ""


def _time(text: Any) -> str:
    """Return a time as it is written, once it is found to be one."""
    when = datetime.fromisoformat(str(text))
    return when.replace(tzinfo=when.tzinfo or UTC).astimezone(UTC).isoformat(timespec="seconds")


def _cache_keys(record: dict[str, Any], regenerated: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of cache entries that a run has noted, by kind."""
    keys, stages = record.get("cache_keys", {}), record.get("stages", {})
    found: dict[str, list[Any]] = {
        "synthetic": [f"{keys['dataset']}.json"] if "dataset" in keys else [],
        "tokenised": [keys.get("tokenised")],
        "regenerated": [keys.get("regenerated"), regenerated.get("key")],
        "pretrained": [keys.get("model")],
        "features": [n for one in stages.values() for n in one.get("features", {}).values()],
    }
    return {kind: [str(name) for name in names if name] for kind, names in found.items()}


def size_and_newest(path: Path) -> tuple[int, datetime]:
    """Return the bytes of a file or directory on disk, and when it was last written to."""
    sizes: dict[tuple[int, int], int] = {}
    newest = path.lstat().st_mtime
    inner = (Path(folder, name) for folder, _, files in os.walk(path) for name in files)
    for file in chain([path], inner):
        status = file.lstat()
        if stat.S_ISREG(status.st_mode):
            # Of the blocks on disk: a sparse file takes less than its length.
            sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
            newest = max(newest, status.st_mtime)
    return sum(sizes.values()), datetime.fromtimestamp(newest, UTC)


def chosen(runs: list[Run], options: argparse.Namespace) -> list[Run]:
    """Return those runs that the options ask for, in their order."""
    patterns = {key: getattr(options, key) for key in ("experiment", "model", "heads", "status")}
    found = [
        run
        for run in runs
        if all(p is None or fnmatchcase(getattr(run, key), p) for key, p in patterns.items())
        and (options.days is None or _age_days(run) <= options.days)
    ]
    return sorted(found, key=_SORTS[options.sort], reverse=True)


def _age_days(run: Run) -> float:
    if not run.when:
        return math.inf
    return (datetime.now(UTC) - datetime.fromisoformat(run.when)) / timedelta(days=1)


def table_of(runs: list[Run], root: Path) -> Table:
    """Return the runs as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("when (UTC)", "run", "experiment", "model", "heads", "status"):
        table.add_column(name, overflow="fold")
    for name in ("tokens/step", "speed-up", "identical", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        place = Path(run.path)
        shown = place.relative_to(root) if place != root else place
        said = f"{run.status}: {run.reason}" if run.reason else run.status
        words = (run.when[:16].replace("T", " "), str(shown), run.experiment, run.model, run.heads)
        table.add_row(
            *map(Text, words),
            Text(said, {"done": "green", "running": "cyan"}.get(run.status, "red")),
            "" if run.tokens_per_step is None else f"{run.tokens_per_step:.2f}",
            "" if run.speedup is None else f"{run.speedup:.2f}x",
            "" if run.identical is None else f"{run.identical:.1%}",
            decimal(run.bytes),
        )
    return table


def wide_console() -> Console:
    """Return a console for tables: lines are not folded for a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medusa_exp.runs.list", description="List runs, the newest first."
    )
    parser.add_argument("root", nargs="?", default="outputs", type=Path, help="where runs are")
    for name in ("experiment", "model", "heads"):
        parser.add_argument(f"--{name}", metavar="GLOB", help=f"only those of this {name}")
    parser.add_argument("--status", choices=STATUSES, help="only those that stand so")
    parser.add_argument("--days", type=float, help="only those of the last so many days")
    parser.add_argument("--sort", choices=list(_SORTS), default="when", help="the greatest first")
    parser.add_argument("--json", action="store_true", help="as a JSON list, with whole reasons")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run as a program."""
    options = _parser().parse_args(arguments)
    with as_program():
        runs = chosen(read_runs(options.root), options)
        if options.json:
            print(json.dumps([asdict(run) for run in runs], indent=1, ensure_ascii=False))
        elif runs:
            wide_console().print(table_of(runs, options.root))
        else:
            print(f"{options.root} holds no run that was asked for.")


if __name__ == "__main__":
    main(sys.argv[1:])
