"""The report of a run: files of the run directory in, one self-contained `report.html` out.

`content.py` turns what was read into what the template shows. The page loads nothing: scripts and
styles are inline, and its content security policy forbids more. It is made to be passed on: the
home directory is $HOME or ~ in it, and data files are names without their folders.
"""

import math
from pathlib import Path

from medusa_exp.runs.files import publish, read_json, read_jsonl
from medusa_exp.tracking import charts, pages
from medusa_exp.tracking import run_report as content
from medusa_exp.tracking.redaction import by_name, shareable, shell_command


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of the run directory, and return its path.

    A file that is absent costs its section, not the report.

    Raises:
        UserError: a file is not valid JSON.
    """
    page = pages.render("report.html.jinja", _content(run_dir))
    with publish(run_dir / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return run_dir / "report.html"


def _content(run_dir: Path) -> content.Row:
    metrics = {
        name: value
        for name, value in read_json(run_dir / "metrics.json", {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    run = read_json(run_dir / "run.json", {})
    run["data"] = by_name(run.get("data", {}))
    calibration = read_json(run_dir / "calibration.json")
    records = content.of_smallest_batch(read_jsonl(run_dir / "records.jsonl"))
    return {
        "run": shareable(run),
        "m": metrics,
        "headline": content.headline(metrics, records),
        "samples": read_jsonl(run_dir / "samples.jsonl"),
        "methods": content.methods(metrics),
        "categories": content.categories(metrics, records),
        "heads": content.heads(metrics),
        "rank_chart": charts.rank_chart(calibration["rank_share"]) if calibration else None,
        "tree": content.tree(read_json(run_dir / "tree.json"), calibration),
        "calibration": content.calibration(calibration),
        "lengths": content.lengths(records),
        "depths": content.depths(metrics),
        "parts_of_time": content.parts_of_time(metrics),
        "curves": content.curves(read_jsonl(run_dir / "history.jsonl")),
        "command": shell_command(run.get("command", [])),
        "later_commands": _later_commands(run),
        "run_dir": shell_command([f"run_dir={run_dir}"]),
    }


def _later_commands(run: content.Row) -> dict[str, str]:
    """Return stage -> command of the stages that another call than the first has made."""
    made_by = {stage: entry.get("command") for stage, entry in run.get("stages", {}).items()}
    return {
        stage: shell_command(command)
        for stage, command in made_by.items()
        if command not in (None, run.get("command")) and stage != "report"
    }
