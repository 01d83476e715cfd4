"""The page of a sweep: files of its jobs in, one self-contained `report.html` beside them out."""

import logging
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from medusa_exp.errors import UserError
from medusa_exp.runs.files import publish, read_json
from medusa_exp.runs.jobs import objective_of, read_jobs
from medusa_exp.runs.metric_table import is_larger_better
from medusa_exp.tracking import pages
from medusa_exp.tracking.comparison_charts import coordinates_chart, effects_chart
from medusa_exp.tracking.redaction import shareable, shell_command

log = logging.getLogger(__name__)

Row = dict[str, Any]

COLUMNS = {
    "eval/speedup": ("speed-up", "%.2f"),
    "eval/tokens_per_step": ("tokens per step", "%.2f"),
    "eval/identical_fraction": ("identical", "%.3f"),
    "val/accept_length": ("val/accept_length", "%.2f"),
    "eval/num_nodes": ("nodes", "%.0f"),
}
"""Metric -> its column's title and format. The objective comes first, whatever it is."""


def write_comparison(sweep_dir: Path) -> Path:
    """Write `sweep_dir/report.html` from the files of the jobs, and return its path.

    Jobs write it one after another, each from what all have left so far.
    """
    with FileLock(sweep_dir / ".report.lock"):
        page = pages.render("comparison.html.jinja", shareable(content(sweep_dir)))
        with publish(sweep_dir / "report.html") as partial:
            partial.write_text(page, encoding="utf-8")
    return sweep_dir / "report.html"


def content(sweep_dir: Path) -> Row:
    """Return what `comparison.html.jinja` shows, by the names it uses.

    `rows` has one for each job, `keys` the settings in which they differ, `shared` the overrides
    that all have, `best` the row with the best `value` of `objective`, or None, and `again` the
    command that measures the speed-up of that one.
    """
    jobs = read_jobs(sweep_dir)
    objective = objective_of(jobs.values())
    rows = [_row(sweep_dir, name, job, objective) for name, job in jobs.items()]
    keys = swept_keys(rows)
    ranked = [row for row in rows if row["value"] is not None]
    pick = max if is_larger_better(objective) else min
    best = pick(ranked, key=lambda row: row["value"], default=None)
    if best is not None:
        best["is_best"] = True
    return {
        "name": f"{rows[0]['name']}: {sweep_dir.name}" if rows else sweep_dir.name,
        "objective": objective,
        "rows": rows,
        "keys": keys,
        "columns": _columns(rows, objective),
        "best": best,
        "counts": _counts(rows),
        "values": _spread([row["value"] for row in ranked]),
        "coordinates": coordinates_chart(ranked, keys, objective) if len(ranked) > 1 else None,
        "effects": effects_chart(ranked, keys, objective) if len(ranked) > 1 else None,
        "shared": _shared_overrides(jobs.values()),
        "again": _command_again(sweep_dir, best) if best else None,
    }


def _row(sweep_dir: Path, name: str, job: Row, objective: str) -> Row:
    run = _read(sweep_dir / name / "run.json")
    metrics = {
        key: value
        for key, value in _read(sweep_dir / name / "metrics.json").items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    is_ours = job["objective"] == objective
    has_page = (sweep_dir / name / "report.html").is_file()
    return {
        "job": name,
        "name": run.get("name", "sweep"),
        "link": f"{name}/report.html" if has_page else None,
        "settings": dict(map(split_override, job["overrides"])),
        "seconds": sum(entry.get("seconds", 0) for entry in run.get("stages", {}).values()),
        "metrics": metrics,
        "is_best": False,
        "value": job["value"] if is_ours else metrics.get(objective),
        **{key: job.get(key) for key in ("number", "status", "error")},
    }


def _command_again(sweep_dir: Path, row: Row) -> str:
    """Return the command that measures a job's speed-up, again or for the first time."""
    is_evaluated = any(name.startswith("eval/") for name in row["metrics"])
    stages = "evaluate,report" if is_evaluated else "calibrate,evaluate,report"
    where = f"run_dir={sweep_dir / row['job']}"
    return shell_command(["python", "-m", "medusa_exp", f"stages=[{stages}]", where])


def _read(path: Path) -> Row:
    """Read a file of one job; nothing of it where it is damaged: the others are shown still."""
    try:
        return dict(read_json(path, {}))
    except UserError as error:
        log.warning("%s", error)
        return {}


def split_override(override: str) -> tuple[str, str]:
    """Return key and value of an override, without signs: `+a.b=1` gives `("a.b", "1")`."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:  # Hydra took it once: shown as it is
        key, _, value = override.partition("=")
        return key.lstrip("+"), value
    return str(parsed.key_or_group), str(parsed.value())


def swept_keys(rows: list[Row]) -> list[str]:
    """Return the keys in which the jobs differ, in the order in which they were given."""
    seen = dict.fromkeys(key for row in rows for key in row["settings"])
    return [key for key in seen if len({row["settings"].get(key) for row in rows}) > 1]


def _shared_overrides(jobs: Iterable[Row]) -> list[str]:
    given = [job["overrides"] for job in jobs]
    return [item for item in given[0] if all(item in other for other in given)] if given else []


def _columns(rows: list[Row], objective: str) -> list[tuple[str, str, str]]:
    """Return (metric, title, format) of the columns that some job has a number for."""
    known = {objective: COLUMNS.get(objective, (objective, "%.4g")), **COLUMNS}
    return [
        (metric, title, form)
        for metric, (title, form) in known.items()
        if any(metric in row["metrics"] for row in rows)
    ]


def _counts(rows: list[Row]) -> dict[str, int]:
    states = [row["status"] for row in rows]
    order = ("done", "failed", "running", "interrupted")
    return {state: states.count(state) for state in order if state in states}


def _spread(values: list[float]) -> Row | None:
    if not values:
        return None
    return {"low": min(values), "median": statistics.median(values), "high": max(values)}
