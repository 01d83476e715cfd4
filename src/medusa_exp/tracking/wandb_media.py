"""What W&B shows of a stage besides its numbers: tables, histograms, pictures and curves.

All is made from the stage's files. The report's charts become PNGs, in the colors that its page
gives them by CSS in a light scheme.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
import wandb
from PIL import Image

from medusa_exp.config.privacy import shareable
from medusa_exp.runs.files import read_json, read_jsonl
from medusa_exp.tracking import run_report
from medusa_exp.tracking.charts import Row

_INK, _SOFT, _LINE = "#1c2422", "#59635f", "#dfe3e0"
_ACCENT, _SECOND, _RAMP = "#0b6b66", "#74857f", ["#eef5f3", "#0b6b66"]
_THEME: dict[str, Any] = {
    "background": "#fcfcfb",
    "font": "sans-serif",
    "mark": {"color": _ACCENT},
    "axis": {"labelColor": _SOFT, "titleColor": _SOFT, "gridColor": _LINE, "ticks": False},
    "axisX": {"grid": False},
    "view": {"stroke": None},
    "text": {"color": _INK},
    "title": {"anchor": "start", "color": _INK},
    "range": {"ramp": _RAMP, "heatmap": _RAMP},
    "style": {
        "reference": {"color": _SOFT, "strokeDash": [3, 3], "opacity": 0.7},
        "chosen": {"color": _ACCENT, "strokeWidth": 2, "filled": False, "fill": None},
        "edge": {"color": _SECOND, "strokeWidth": 1.2, "opacity": 0.7},
        "node": {"stroke": _ACCENT, "strokeWidth": 1},
        "on-pale": {"color": _INK},
        "on-strong": {"color": "#ffffff"},
    },
}
_WIDTH = 720
_RUN_MARK = " | "
"""Between what two decoding steps gave."""


def media(out: Path, stage: str) -> Iterator[Row]:
    """Yield what `run.log` takes, a dict a step of W&B's history."""
    if stage in _MEDIA:
        yield from _MEDIA[stage](out)


def _data_rows(out: Path) -> Iterator[Row]:
    found = read_json(out / "data.json", {})
    tables = {"data/dropped": table(_outcomes(found))}
    if samples := read_jsonl(out / "data_samples.jsonl"):
        tables["data/samples"] = table(samples)
    yield tables


def _outcomes(found: Row) -> list[Row]:
    """Return a row a source and outcome: kept records, and dropped ones by reason."""
    examples = found.get("examples", {})
    return [
        {"source": source, "outcome": outcome, "reason": reason, "records": number}
        | {"example": examples.get(reason, "")}
        for source, counts in found.get("sources", {}).items()
        for outcome, reason, number in [
            ("kept", "", counts["kept records"]),
            *(("dropped", reason, number) for reason, number in counts["dropped"].items()),
        ]
    ]


def _train_rows(out: Path) -> Iterator[Row]:
    yield from _data_rows(out)
    heads = run_report.heads(read_json(out / "metrics.json", {}))
    for row in heads["rows"] if heads else []:
        yield {f"by_head/{name}": value for name, value in row.items() if value is not None}


def _calibration_rows(out: Path) -> Iterator[Row]:
    measured = read_json(out / "calibration.json")
    plain = measured["plain_expected_seconds"]
    for point in measured["curve"]:
        yield {
            "by_nodes/num_nodes": point["num_nodes"],
            "by_nodes/tokens_per_step": point["tokens_per_step"],
            "by_nodes/step_over_plain": point["step_seconds"] / measured["plain_step_seconds"],
            "by_nodes/speedup": plain / point["expected_seconds"],
        }
    curve = run_report.calibration(measured)
    assert curve is not None
    shares = [
        {"head": head, "rank": rank, "share": share}
        for head, of_head in enumerate(measured["rank_share"], 1)
        for rank, share in enumerate(of_head)
    ]
    yield {
        "images/calibration": _image(*curve["charts"].values()),
        "images/tree": _tree_image(out),
        "calibrate/rank_share": table(shares),
    }


def _evaluation_rows(out: Path) -> Iterator[Row]:
    records = read_jsonl(out / "records.jsonl")
    metrics = read_json(out / "metrics.json", {})
    for row in run_report.depths(metrics):
        yield {"by_depth/depth": row["depth"], "by_depth/accepted": row["share"]}
    of_tree = [row for row in run_report.methods(metrics, records) if row.pop("method") == "tree"]
    for row in of_tree:  # the smaller batches first
        yield {f"by_batch/{name}": value for name, value in row.items()}
    ours = run_report.of_smallest_batch(records)
    yield {
        "eval/accept_lengths": wandb.Histogram(np_histogram=_histogram(ours)),
        "eval/records": table(records),
        "eval/samples": table([_sample_row(row) for row in read_jsonl(out / "samples.jsonl")]),
        "images/tree": _tree_image(out),
    }


_MEDIA: dict[str, Callable[[Path], Iterator[Row]]] = {
    "inspect": _data_rows,
    "train": _train_rows,
    "calibrate": _calibration_rows,
    "evaluate": _evaluation_rows,
}


def _histogram(records: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return numpy's form of a histogram: steps that gave 1, 2, 3 ... tokens, and edges of bins."""
    lengths = [length for record in records for length in record["accept_lengths"]]
    return np.histogram(lengths, bins=np.arange(1, max(lengths) + 2) - 0.5)


def _sample_row(sample: Row) -> Row:
    runs = ["".join(step) for step in sample["steps"]]
    return {
        **{name: sample[name] for name in ("prompt_id", "category", "prompt")},
        "answer": "".join(runs),
        "accepted_runs": _RUN_MARK.join(runs),
        "accept_lengths": [len(step) for step in sample["steps"]],
    }


def table(rows: list[Row]) -> Any:
    """Return a W&B table; columns are all keys in order of appearance, lists become JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    return wandb.Table(columns=names, data=cells)


def _cell(value: Any) -> Any:
    value = shareable(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _tree_image(out: Path) -> Any:
    drawn = run_report.tree(read_json(out / "tree.json"), read_json(out / "calibration.json"))
    assert drawn is not None
    return _image(drawn["chart"])


def _image(*charts: Row) -> Any:
    return wandb.Image(Image.open(io.BytesIO(png(*charts))))


def png(*charts: dict[str, Any]) -> bytes:
    """Draw charts of `charts.py` below one another."""
    sized = [{**chart, "width": _WIDTH} for chart in charts]
    drawing: bytes = vl_convert.vegalite_to_png({"vconcat": sized}, config=_THEME, scale=2)
    return drawing
