"""The report of a run: files of the run directory in, one self-contained `report.html` out.

`content.py` turns what was read into what the template shows. The page loads nothing: scripts and
styles are inline, and its content security policy forbids more.
"""

import math
import shlex
from functools import cache
from pathlib import Path

from medusa_exp.files import publish, read_json, read_jsonl
from medusa_exp.tracking import charts, content


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of the run directory, and return its path.

    A file that is absent costs its section, not the report.

    Raises:
        UserError: a file is not valid JSON.
    """
    page = _render(_content(run_dir))
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
    calibration = read_json(run_dir / "calibration.json")
    records = content.first_batch_size(read_jsonl(run_dir / "records.jsonl"))
    return {
        "run": run,
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
        "curves": content.curves(read_jsonl(run_dir / "history.jsonl")),
        "command": shlex.join(run.get("command", [])),
        "run_dir": shlex.quote(f"run_dir={run_dir}"),
    }


def _render(values: content.Row) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["parts"] = content.parts
    return environment.get_template("report.html.jinja").render(values, scripts=_scripts())


@cache
def _scripts() -> str:
    """Return Vega, Vega-Lite and vegaEmbed as one script that can stand inside a page."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks too much
    return bundle.replace("</script", "<\\/script")
