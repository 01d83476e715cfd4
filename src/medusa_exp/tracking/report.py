"""The report of a run: files of the run directory in, one self-contained `report.html` out.

A function below turns what was read into what the template shows in the section of its name, or
into None where the file is not there yet; the template then names the stage that writes it. The
page loads nothing: scripts and styles are inline, and its content security policy forbids more.
"""

import math
import re
import shlex
import statistics
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from medusa_exp.files import publish, read_json, read_jsonl
from medusa_exp.tracking import charts

MAX_CURVE_POINTS = 300
"""More points of a line are thinned evenly; the last one always stays."""

_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>|<(?:pad|bos|eos|unk|start_of_turn|end_of_turn)>")
_PANELS = {
    "train/loss": "Training loss",
    "val/loss": "Held-out loss",
    "val/top1": "Held-out top-1",
    "val/top5": "Held-out top-5",
}

Row = dict[str, Any]


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


def _content(run_dir: Path) -> Row:
    metrics = {
        name: value
        for name, value in read_json(run_dir / "metrics.json", {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    run = read_json(run_dir / "run.json", {})
    calibration = read_json(run_dir / "calibration.json")
    records = _first_batch_size(read_jsonl(run_dir / "records.jsonl"))
    return {
        "run": run,
        "m": metrics,
        "headline": _headline(metrics, records),
        "samples": read_jsonl(run_dir / "samples.jsonl"),
        "categories": _categories(metrics, records),
        "heads": _heads(metrics),
        "rank_chart": charts.rank_chart(calibration["rank_share"]) if calibration else None,
        "tree": _tree(read_json(run_dir / "tree.json"), calibration),
        "calibration": _calibration(calibration),
        "lengths": _lengths(records),
        "curves": _curves(read_jsonl(run_dir / "history.jsonl")),
        "command": shlex.join(run.get("command", [])),
        "run_dir": shlex.quote(f"run_dir={run_dir}"),
    }


def _render(content: Row) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["parts"] = _parts
    return environment.get_template("report.html.jinja").render(content, scripts=_scripts())


@cache
def _scripts() -> str:
    """Return Vega, Vega-Lite and vegaEmbed as one script that can stand inside a page."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks too much
    return bundle.replace("</script", "<\\/script")


def _first_batch_size(records: Iterable[Row]) -> list[Row]:
    """Keep Medusa's records of the smallest batch size: there is one for each prompt."""
    ours = [record for record in records if record["method"] == "tree"]
    smallest = min((record["batch_size"] for record in ours), default=1)
    return [record for record in ours if record["batch_size"] == smallest]


def _headline(metrics: Row, records: list[Row]) -> Row | None:
    if "eval/speedup" not in metrics and not records:
        return None
    checked = [record["identical"] for record in records if record.get("identical") is not None]
    fraction = metrics.get("eval/identical_fraction")
    ratios = [
        record["baseline_seconds"] / record["seconds"]
        for record in records
        if record.get("baseline_seconds") and record.get("seconds")
    ]
    return {
        "speedup": metrics.get("eval/speedup"),
        "num_prompts": len(records),
        "num_checked": len(checked),
        "num_identical": sum(checked),
        "fraction": fraction,
        "is_checked": bool(checked) or fraction is not None,
        "is_identical": all(checked) and (fraction is None or fraction >= 1),
        "quartiles": statistics.quantiles(ratios, n=4) if len(ratios) >= 4 else None,
    }


def _parts(piece: str) -> list[tuple[str, str]]:
    """Split a token's text into (kind, text): special tokens and line ends are to be seen."""
    if _SPECIAL.fullmatch(piece.strip()):
        return [("special", piece.strip())]
    parts = [("newline" if part == "\n" else "text", part) for part in re.split("(\n)", piece)]
    return [part for part in parts if part[1]]


def _categories(metrics: Row, records: list[Row]) -> Row | None:
    rows: dict[str, Row] = {}
    for name, value in metrics.items():
        match = re.fullmatch(r"eval/category/(.+)/(speedup|tokens_per_step)", name)
        if match:
            rows.setdefault(match[1], {"category": match[1]})[match[2]] = value
    for category, row in rows.items():
        row["num_prompts"] = sum(record.get("category") == category for record in records)
    ordered = sorted(rows.values(), key=lambda row: -row.get("speedup", 0.0))
    return {"rows": ordered, "chart": charts.category_chart(ordered)} if rows else None


def _heads(metrics: Row) -> Row | None:
    numbers = sorted(
        int(match[1]) for name in metrics if (match := re.fullmatch(r"val/top1_head(\d+)", name))
    )
    fields = ("loss", "top1", "top5")
    rows = [{f: metrics.get(f"val/{f}_head{k}") for f in fields} | {"head": k} for k in numbers]
    bars = [
        {"head": f"head {row['head']}", "kind": kind, "share": row[field]}
        for row in rows
        for field, kind in (("top1", "top-1"), ("top5", "top-5"))
        if row[field] is not None
    ]
    return {"rows": rows, "chart": charts.accuracy_chart(bars)} if rows else None


def _tree(tree: Row | None, calibration: Row | None) -> Row | None:
    if tree is None:
        return None
    parents, probability = tree["parents"], (calibration or {}).get("node_probability", [])
    if len(probability) != len(parents):
        probability = None  # another tree than the calibrated one
    nodes = charts.tree_layout(parents, tree["ranks"], probability)
    return {
        "num_nodes": len(parents),
        "depth": max(node["depth"] for node in nodes),
        "has_probability": probability is not None,
        "expected": sum(probability or []),
        "chart": charts.tree_chart(parents, tree["ranks"], probability),
    }


def _calibration(calibration: Row | None) -> Row | None:
    if calibration is None:
        return None
    plain, chosen = calibration["plain_step_seconds"], calibration["num_nodes"]
    curve = [{**row, "relative": row["step_seconds"] / plain} for row in calibration["curve"]]
    titles = {
        "tokens_per_step": "Tokens per step",
        "relative": "Step time (plain step = 1)",
        "tokens_per_second": "Tokens per second",
    }
    return {
        "num_positions": calibration["num_positions"],
        "curve": curve,
        "chosen": chosen,
        "charts": {t: charts.calibration_chart(curve, f, t, chosen) for f, t in titles.items()},
    }


def _lengths(records: list[Row]) -> Row | None:
    lengths = [length for record in records for length in record["accept_lengths"]]
    if not lengths:
        return None
    longer = sum(length > 1 for length in lengths) / len(lengths)
    averages = {"mean": statistics.fmean(lengths), "longer": longer}
    return {"total": len(lengths), "chart": charts.length_chart(lengths), **averages}


def _curves(history: list[Row]) -> Row | None:
    """Group the history as stage -> panels; the last line of a (stage, step, metric) counts."""
    values = {
        (row["stage"], name, row["step"]): value
        for row in history
        for name, value in row.items()
        if name not in ("stage", "step") and isinstance(value, int | float)
    }
    panels: dict[str, dict[str, dict[str, list[Row]]]] = {}
    num_broken = sum(not math.isfinite(value) for value in values.values())
    for (stage, name, step), value in sorted(values.items()):
        if math.isfinite(value):
            panel, _, head = name.partition("_head")
            series = f"head {head}" if head else "all heads"
            lines = panels.setdefault(stage, {}).setdefault(panel, {})
            lines.setdefault(series, []).append({"step": step, "value": value, "series": series})
    stages = {
        stage: {_PANELS.get(name, name): _curve(name, lines) for name, lines in found.items()}
        for stage, found in panels.items()
    }
    return {"stages": stages, "num_broken": num_broken} if values else None


def _curve(name: str, lines: dict[str, list[Row]]) -> Row:
    in_order = sorted(lines, key=lambda series: (series == "all heads", len(series), series))
    rows = [row for series in in_order for row in _thinned(lines[series])]
    return charts.curve_chart(rows, _PANELS.get(name, name), is_share="top" in name)


def _thinned(line: list[Row]) -> list[Row]:
    stride = -(-len(line) // MAX_CURVE_POINTS)
    return [*line[:-1:stride], line[-1]]
