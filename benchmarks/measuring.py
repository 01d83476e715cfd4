"""Two ways of doing one thing in; a table of how long each took, and on what machine, out."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import medusa_exp
from medusa_exp.runs.machine import cpu_name, usable_cores
from medusa_exp.runs.record import versions

_PACKAGES = ("medusa-exp", "torch", "transformers", "tokenizers", "msgspec", "numpy")


@dataclass
class Row:
    """A line of the table."""

    what: str
    unit: str
    ours: float
    bar: str
    """What is to be cleared, in words."""
    is_cleared: bool
    reference: float | None = None
    ratio: float | None = None
    """How many times better ours is."""
    details: dict[str, Any] = field(default_factory=dict)


def best_seconds(
    repeats: int, *sides: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Run every side in turn, `repeats` times over; return each one's shortest time.

    Callers have run each side once before: for its caches, and to see that it does what it claims.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for taken, side in zip(seconds, sides, strict=True):
            gc.collect()
            start = clock()
            result = side()
            taken.append(clock() - start)
            del result  # taking it apart is not part of the time
    return [min(taken) for taken in seconds]


def machine() -> dict[str, Any]:
    """Describe what the numbers depend on; `load` says how busy the machine was beforehand."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(rows: list[Row], machine: dict[str, Any]) -> None:
    """Print the table and the machine."""
    table = Table()
    for heading in ("what", "ours", "reference", "ratio", "bar to clear", "cleared"):
        is_number = heading in ("ours", "reference", "ratio")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.what,
            _number(row.ours, row.unit),
            _number(row.reference, row.unit),
            _number(row.ratio, "x"),
            row.bar,
            "[green]yes" if row.is_cleared else "[red]no",
        )
    console = Console(width=max(Console().width, 132))
    console.print(table)
    for row in rows:
        said = ", ".join(f"{name} {_plain(value)}" for name, value in row.details.items())
        if said:
            console.print(f"{row.what}: {said}", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}; {versions}; "
        f"commit {machine['commit']}",
        highlight=False,
    )


def write(path: Path, rows: list[Row], machine: dict[str, Any]) -> None:
    """Write the same as JSON."""
    command = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    found = {"command": command, "machine": machine, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 or value == int(value) else 2
    return f"{value:,.{digits}f}{'' if unit in ('x', '') else ' '}{unit}"


def _plain(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _commit() -> str | None:
    """Return the commit of the package that is measured, with + for changes since."""

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(Path(medusa_exp.__file__).parent), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
