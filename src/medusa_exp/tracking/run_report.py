"""The report of a run: `report.html`, one self-contained page made from the run directory's files.

A function below gives what the template shows in the section of its name, or None where the file is
not there yet; the template then names the stage that writes it. The page loads nothing: scripts and
styles are inline, and its content security policy forbids more. It is made to be passed on: the
home directory is $HOME or ~ in it, and data files are names without their folders.
"""

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import count, takewhile
from pathlib import Path

import jinja2
import vl_convert

from medusa_exp.config.privacy import by_name, shareable, shell_command
from medusa_exp.runs.files import publish, read_json, read_jsonl
from medusa_exp.runs.metric_table import (
    METRICS,
    PARTS_OF_LOSS,
    PARTS_OF_TIME,
    Metric,
    metric_of,
    rate_text,
)
from medusa_exp.tracking import charts
from medusa_exp.tracking.charts import MEASURES, Row

MAX_CURVE_POINTS = 300
"""More points of a line are thinned evenly; the last one always stays."""
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>|<(?:pad|bos|eos|unk|start_of_turn|end_of_turn)>")
_OF_HEADS = "_head{head}"
"""End of the names of what is measured of each head: lines of one panel."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of the run directory, and return its path.

    A file that is absent costs its section, not the report.

    Raises:
        UserError: a file is not valid JSON.
    """
    return render("report.html.jinja", _content(run_dir), run_dir / "report.html")


def _content(run_dir: Path) -> Row:
    metrics = finite_numbers(read_json(run_dir / "metrics.json", {}))
    run = read_json(run_dir / "run.json", {})
    run["data"] = by_name(run.get("data", {}))
    calibrated = read_json(run_dir / "calibration.json")
    all_records = read_jsonl(run_dir / "records.jsonl")
    records = of_smallest_batch(all_records)
    return {
        "run": shareable(run),
        "m": metrics,
        "headline": headline(metrics, records),
        "samples": read_jsonl(run_dir / "samples.jsonl"),
        "why": why(read_json(run_dir / "why.json")),
        "methods": methods(metrics, all_records),
        "served": served(metrics, read_json(run_dir / "serving.json", {})),
        "categories": categories(metrics, records),
        "heads": heads(metrics),
        "rank_chart": charts.rank_chart(calibrated["rank_share"]) if calibrated else None,
        "tree": tree(read_json(run_dir / "tree.json"), calibrated),
        "calibration": calibration(calibrated),
        "lengths": lengths(records),
        "depths": depths(metrics),
        "parts_of_time": parts_of_time(metrics),
        "curves": curves(read_jsonl(run_dir / "history.jsonl")),
        "command": shell_command(run.get("command", [])),
        "later_commands": _later_commands(run),
        "run_dir": shell_command([f"run_dir={run_dir}"]),
    }


def finite_numbers(metrics: Row) -> Row:
    """Return the metrics that can be drawn and compared."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _later_commands(run: Row) -> dict[str, str]:
    """Return stage -> command of the stages that another call than the first has made."""
    made_by = {stage: entry.get("command") for stage, entry in run.get("stages", {}).items()}
    return {
        stage: shell_command(command)
        for stage, command in made_by.items()
        if command not in (None, run.get("command")) and stage != "report"
    }


def headline(metrics: Row, records: list[Row]) -> Row | None:
    """Return the speed-up, and on how many prompts the output is plain decoding's."""
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
        "stats": _stats(metrics),
        "quartiles": statistics.quantiles(ratios, n=4) if len(ratios) >= 4 else None,
    }


def _stats(metrics: Row) -> list[tuple[Metric, str]]:
    """Return (metric, label) of the figures beside the speed-up."""
    measured = [row for row in METRICS if row.name in metrics]
    texts: defaultdict[str, str] = defaultdict(lambda: "\u2013")
    texts |= {row.name: row.bare(metrics[row.name]) for row in measured}
    return [(row, row.stat.format_map(texts)) for row in measured if row.stat]


def of_smallest_batch(records: Iterable[Row]) -> list[Row]:
    """Keep Medusa's records of the smallest batch size: there is one for each prompt."""
    ours = [record for record in records if record["method"] == "tree"]
    smallest = min((record["batch_size"] for record in ours), default=1)
    return [record for record in ours if record["batch_size"] == smallest]


def why(found: Row | None) -> Row | None:
    """Return the way from the ideal to the speed-up, in a chart and in rows of a cell a batch size.

    A cell is (times, share of the ideal); a part's is below 0 where it takes something away.
    """
    if found is None:
        return None
    falls = found["waterfalls"]
    if not falls:
        return {**found, "rows": []}
    by_name = [{part["name"]: part for part in fall["parts"]} for fall in falls]
    parts_of_way = [
        {
            "title": title,
            "is_part": True,
            "cells": [
                (-parts[name]["times"], -parts[name]["share"]) if name in parts else (None, None)
                for parts in by_name
            ],
        }
        for name, title in PARTS_OF_LOSS.items()
        if any(name in parts for parts in by_name)
    ]

    def end(key: str, title: str) -> Row:
        cells = [(fall[key], fall[key] / fall["ideal"]) for fall in falls]
        return {"title": title, "is_part": False, "cells": cells}

    rows = [
        end("ideal", "tokens per step, if all steps cost the same"),
        *parts_of_way,
        end("measured", "speed-up"),
    ]
    return {
        **found,
        "sizes": [fall["batch_size"] for fall in falls],
        "ideal": falls[0]["ideal"],
        "measured": falls[0]["measured"],
        "rows": rows,
        "chart": charts.waterfall_chart(
            [(row["title"], row["cells"][0][0], row["is_part"]) for row in rows]
        ),
    }


def methods(metrics: Row, records: Iterable[Row]) -> list[Row]:
    """Return a row a method and batch size that records are of, the faster ones first."""
    figures = ("speedup", "tokens_per_step", "tokens_per_second", "identical_fraction")
    rows = []
    for method, size in sorted({(record["method"], record["batch_size"]) for record in records}):
        found = {figure: metrics.get(f"eval/{method}/b{size}/{figure}") for figure in figures}
        known = {figure: value for figure, value in found.items() if value is not None}
        if known:
            rows.append({"method": method, "batch_size": size, **known})
    return sorted(rows, key=lambda row: (row["batch_size"], -row.get("speedup", 0)))


def served(metrics: Row, about: Row) -> Row | None:
    """Return what was measured of running engines: a row a concurrency, a row a position."""
    names = {"server": "", "server_plain": "plain_"}
    levels: defaultdict[int, Row] = defaultdict(dict)
    for name, value in metrics.items():
        if found := re.fullmatch(r"eval/(server|server_plain)/c(\d+)/(\w+)", name):
            server, concurrency, figure = found.groups()
            levels[int(concurrency)][f"{names[server]}{figure}"] = value
    if not levels:
        return None
    positions = [
        {
            "position": position,
            "measured": metrics[f"eval/server/accepted_position{position}"],
            "predicted": metrics.get(f"eval/server/predicted_accepted_position{position}"),
        }
        for position in _numbers(metrics, "eval/server/accepted_position")
    ]
    return {
        "levels": [{"concurrency": number, **levels[number]} for number in sorted(levels)],
        "positions": positions,
        "has_plain": any("plain_tokens_per_second" in row for row in levels.values()),
        **{key: about.get("heads", {}).get(key) for key in ("model", "fingerprint")},
    }


def categories(metrics: Row, records: list[Row]) -> Row | None:
    """Return a row a category, and a chart of them."""
    prompts = Counter(record["category"] for record in records)
    rows = [
        {
            "category": category,
            "num_prompts": number,
            **{figure: metrics.get(f"eval/category/{category}/{figure}") for figure in MEASURES},
        }
        for category, number in sorted(prompts.items())
    ]
    ordered = sorted(rows, key=lambda row: -(row["speedup"] or 0.0))
    return {"rows": ordered, "chart": charts.category_chart(ordered)} if ordered else None


def heads(metrics: Row) -> Row | None:
    """Return a row a head, and a chart of them."""
    figures = ("loss", "top1", "top5")
    rows = [
        {figure: metrics.get(f"val/{figure}_head{k}") for figure in figures} | {"head": k}
        for k in _numbers(metrics, "val/top1_head")
    ]
    bars = [
        {"head": f"head {row['head']}", "kind": kind, "share": row[field]}
        for row in rows
        for field, kind in (("top1", "top-1"), ("top5", "top-5"))
        if row[field] is not None
    ]
    return {"rows": rows, "chart": charts.accuracy_chart(bars)} if rows else None


def tree(used: Row | None, measured: Row | None) -> Row | None:
    """Draw tree.json, with each node's probability where calibration.json knows it."""
    if used is None:
        return None
    parents, measured = used["parents"], measured or {}
    probability = measured.get("node_probability", [])
    if len(probability) != len(parents) or not _is_same(used, measured.get("tree")):
        probability = None  # another tree than the calibrated one
    nodes = charts.tree_layout(parents, used["ranks"], probability)
    return {
        "num_nodes": len(parents),
        "num_lookup": used.get("num_lookup", 0),
        "depth": max(node["depth"] for node in nodes),
        "has_probability": probability is not None,
        "expected": measured.get("predicted_tokens_per_step"),
        "chart": charts.tree_chart(parents, used["ranks"], probability),
    }


def _is_same(tree: Row, other: Row | None) -> bool:
    """Are they the same trees, as far as it is known of the other?"""
    shape = ("parents", "ranks", "num_picked", "num_lookup")
    return other is None or all((tree.get(k) or 0) == (other.get(k) or 0) for k in shape)


def calibration(measured: Row | None) -> Row | None:
    """Return the curve of tree sizes in charts, and what was found for each batch size; of
    calibration.json."""
    if measured is None:
        return None
    plain, chosen = measured["plain_step_seconds"], measured["num_nodes"]
    tree, with_lookup = measured.get("tree"), measured.get("with_lookup", [])
    num_lookup = (tree or {}).get("num_lookup", 0)
    if tree and with_lookup and num_lookup:  # the heads' own tree is on the curve
        chosen = len(tree["parents"])
    points = [*measured["curve"], *with_lookup]
    is_tried = any(row.get("is_rehearsed") for row in points)
    rows = [
        {
            **row,
            "relative": row["step_seconds"] / plain,
            "num_lookup": (row.get("tree") or {}).get("num_lookup", 0),
            "is_estimate": is_tried and not row.get("is_rehearsed"),
            "is_chosen": row["num_nodes"] == measured["num_nodes"]
            and (not row.get("tree") or _is_same(row["tree"], tree)),
        }
        for row in points
    ]
    curve = rows[: len(measured["curve"])]
    titles = {
        "tokens_per_step": "Tokens per step",
        "relative": "Step time (plain step = 1)",
        "tokens_per_second": f"Tokens per second{' (pale: estimated)' if is_tried else ''}",
    }
    return {
        "num_positions": measured["num_positions"],
        "rows": rows,
        "is_tried": is_tried,
        "is_choice_tried": any(r["is_chosen"] and not r["is_estimate"] for r in rows),
        "num_nodes": measured["num_nodes"] - num_lookup,
        "num_lookup": num_lookup,
        "batch_sizes": measured.get("batch_sizes", []),
        "break_even": measured.get("break_even_batch_size"),
        "charts": {t: charts.calibration_chart(curve, f, t, chosen) for f, t in titles.items()},
    }


def lengths(records: list[Row]) -> Row | None:
    """Return a histogram of the tokens that steps committed."""
    committed = [length for record in records for length in record["accept_lengths"]]
    if not committed:
        return None
    longer = sum(length > 1 for length in committed) / len(committed)
    averages = {"mean": statistics.fmean(committed), "longer": longer}
    return {"total": len(committed), "chart": charts.length_chart(committed), **averages}


def depths(metrics: Row) -> list[Row]:
    """Return, for each depth of the tree, the share of steps that accept a guess there."""
    return [
        {"depth": depth, "share": metrics[f"eval/accepted_depth{depth}"]}
        for depth in _numbers(metrics, "eval/accepted_depth")
    ]


def _numbers(metrics: Row, name: str) -> list[int]:
    """Return 1, 2, 3 ..., as far as there is a metric of this name with the number."""
    return list(takewhile(lambda number: f"{name}{number}" in metrics, count(1)))


def parts_of_time(metrics: Row) -> list[Row]:
    """Return, for each part of a decoding step, its share of the time."""
    shares = {what: metrics.get(f"eval/time/{part}") for part, what in PARTS_OF_TIME.items()}
    known = [{"part": what, "share": share} for what, share in shares.items() if share is not None]
    return sorted(known, key=lambda row: -row["share"])


def curves(history: list[Row]) -> Row | None:
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
            panel, head = _panel_and_head(name)
            series = f"head {head}" if head else "all heads"
            lines = panels.setdefault(stage, {}).setdefault(panel, {})
            lines.setdefault(series, []).append({"step": step, "value": value, "series": series})
    stages = {
        stage: {_title(name): _curve(name, lines) for name, lines in found.items()}
        for stage, found in panels.items()
    }
    return {"stages": stages, "num_broken": num_broken} if values else None


def _panel_and_head(name: str) -> tuple[str, str]:
    """Return the panel of a logged metric, and its head where it is of one."""
    metric = metric_of(name)
    if metric is None or not metric.name.endswith(_OF_HEADS):
        return name, ""
    panel = metric.name.removesuffix(_OF_HEADS)
    return panel, name.removeprefix(f"{panel}_head")


def _of_panel(panel: str) -> Metric | None:
    return metric_of(panel) or metric_of(f"{panel}_head1")


def _title(panel: str) -> str:
    metric = _of_panel(panel)
    return metric.title[0].upper() + metric.title[1:] if metric else panel


def _curve(name: str, lines: dict[str, list[Row]]) -> Row:
    in_order = sorted(lines, key=lambda series: (series == "all heads", len(series), series))
    rows = [row for series in in_order for row in _thinned(lines[series])]
    metric = _of_panel(name)
    is_share = metric is not None and metric.unit == "share"
    return charts.curve_chart(rows, _title(name), is_share=is_share)


def _thinned(line: list[Row]) -> list[Row]:
    stride = -(-len(line) // MAX_CURVE_POINTS)
    return [*line[:-1:stride], line[-1]]


def render(template: str, values: Row, path: Path) -> Path:
    """Write the page of a template in this directory; what is put in is escaped."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text_parts"] = text_parts
    environment.filters["rate_text"] = rate_text
    environment.filters["breakable"] = lambda name: re.findall(r"[^._/]*[._/]?", name)[:-1]
    page = environment.get_template(template).render(values, scripts=_scripts())
    with publish(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


@cache
def _scripts() -> str:
    """Return Vega, Vega-Lite and vegaEmbed as one script that can stand inside a page."""
    bundle: str = vl_convert.javascript_bundle()
    return bundle.replace("</script", "<\\/script")


def text_parts(piece: str) -> list[tuple[str, str]]:
    """Split a token's text into (kind, text), kind special, newline or text.

    Special tokens and line ends are marked on the page, where they would not be seen else.
    """
    if _SPECIAL.fullmatch(piece.strip()):
        return [("special", piece.strip())]
    parts = [("newline" if part == "\n" else "text", part) for part in re.split("(\n)", piece)]
    return [part for part in parts if part[1]]
