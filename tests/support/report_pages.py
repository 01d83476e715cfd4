"""The files of a run and of a sweep, and their pages as a browser would read them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from medusa_exp.tracking.run_report import write_report

METRICS = {
    "train/loss": 1.2,
    "val/top1_head1": 0.713,
    "val/top5_head1": 0.902,
    "val/loss_head1": 1.417,
    "eval/speedup": 1.62,
    "eval/tokens_per_step": 2.14,
    "eval/tokens_per_second": 842.0,
    "eval/identical_fraction": 1.0,
    "eval/baseline_vs_hf": 1.31,
    "eval/prompt_lookup_speedup": 1.19,
    "eval/tree/b1/speedup": 1.62,
    "eval/accepted_depth1": 0.7,
    "eval/time/backbone": 0.831,
    "eval/time/heads": 0.169,
    "eval/category/math/speedup": 1.87,
    "eval/category/math/tokens_per_step": 2.55,
}
RUN = {
    "name": "quickstart",
    "command": ["python", "-m", "medusa_exp", "+experiment=quickstart"],
    "created": "2026-03-02T10:12:44+00:00",
    "git": {"commit": "8f3c1d0", "dirty": True},
    "versions": {"torch": "2.13.0"},
    "data": {"train.jsonl": "a3" * 32},
    "stages": {
        "train": {"status": "done", "seconds": 61.2},
        "evaluate": {"status": "failed", "seconds": 3.0, "error": "ValueError: no"},
        "report": {"status": "running"},
    },
}
TREE = {"parents": [-1, 0, 0, 1], "ranks": [-1, 0, 1, 0]}
CALIBRATION = {
    "num_positions": 1800,
    "rank_share": [[0.7, 0.1], [0.5, 0.1]],
    "curve": [
        {"num_nodes": n, "tokens_per_step": t, "step_seconds": 0.002, "tokens_per_second": 500 * t}
        for n, t in ((1, 1.0), (4, 2.0))
    ],
    "num_nodes": 4,
    "node_probability": [1.0, 0.7, 0.1, 0.4],
    "plain_step_seconds": 0.0018,
    "batch_sizes": [
        {"batch_size": b, "num_nodes": 4, "predicted_tokens_per_step": 2.0, "predicted_speedup": s}
        for b, s in ((1, 1.9), (8, 1.2))
    ],
    "break_even_batch_size": None,
}
HISTORY = [
    {"stage": "train", "step": 20, "train/loss": 9.125},
    {"stage": "train", "step": 20, "train/loss": 3.25, "val/top1_head1": 0.5},
    {"stage": "train", "step": 40, "train/loss": float("nan")},
]
SAMPLES = [
    {
        "prompt_id": "p0",
        "category": "math",
        "prompt": "</script><b>bold",
        "steps": [["She", " bought"], ["3"], [" <i>", " of", "<|im_end|>"]],
    }
]
RECORD = {"category": "math", "accept_lengths": [3, 1, 2], "seconds": 1.0, "baseline_seconds": 1.6}
KINDS = (("tree", 1, True), ("tree", 4, True), ("plain", 1, None))
RECORDS = [
    {**RECORD, "prompt_id": f"p{i}", "method": method, "batch_size": size, "identical": identical}
    for i in range(5)
    for method, size, identical in KINDS
]
WHY = {
    "waterfalls": [
        {
            "batch_size": 1,
            "ideal": 2.5,
            "measured": 1.62,
            "parts": [
                {"name": "acceptance", "times": 0.36, "share": 0.144},
                {"name": "heads", "times": 0.57, "share": 0.228},
                {"name": "unexplained", "times": -0.05, "share": -0.02},
            ],
        },
        {
            "batch_size": 8,
            "ideal": 2.5,
            "measured": 0.9,
            "parts": [
                {"name": "acceptance", "times": 0.3, "share": 0.12},
                {"name": "heads", "times": 0.5, "share": 0.2},
                {"name": "unexplained", "times": -0.04, "share": -0.016},
                {"name": "batch", "times": 0.84, "share": 0.336},
            ],
        },
    ],
    "advice": ["The heads take 31% of a step: take head=medusa_tied.", "Speculate <b>less</b>."],
    "validation": 2.5,
    "when": "From 7 prompts at a time on, plain decoding is faster.",
    "schedule": [[1, 6, 4], [7, 8, 0]],
}
FILES = {
    "metrics.json": METRICS,
    "run.json": RUN,
    "tree.json": TREE,
    "calibration.json": CALIBRATION,
    "history.jsonl": HISTORY,
    "records.jsonl": RECORDS,
    "samples.jsonl": SAMPLES,
    "why.json": WHY,
}

JOBS = [
    ("a", 0, "done", ["+experiment=x", "head.num_heads=3", "dtype=bf16"], 2.5),
    ("b", 1, "done", ["+experiment=x", "head.num_heads=10", "dtype=fp32"], 3.25),
    ("c", 2, "failed", ["+experiment=x", "head.num_heads=99", "dtype=fp32"], None),
    ("d", 3, "running", ["+experiment=x", "head.num_heads=4", "dtype=fp32"], None),
]


class Page(HTMLParser):
    """What a browser would load, draw and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.specs: list[dict] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.titles: list[str] = []
        self._inside: dict[str, str | None] = {}
        self.feed(html)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._inside = {"tag": tag, **found}
        self.tags.append(tag)
        self.addresses += [found[name] or "" for name in ("src", "href") if name in found]
        self.titles += [" ".join((found["title"] or "").split())] if "title" in found else []

    def handle_endtag(self, tag: str) -> None:
        self._inside = {}

    def handle_data(self, data: str) -> None:
        if self._inside.get("type") == "application/json":
            self.specs.append(json.loads(data))
        elif self._inside.get("tag") not in ("script", "style"):
            self.words.append(data)


def write_run(out: Path, **changed: object) -> Path:
    for name, content in {**FILES, **{k.replace("__", "."): v for k, v in changed.items()}}.items():
        lines = content if name.endswith(".jsonl") else [content]
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def page_of(out: Path) -> Page:
    return Page(write_report(out).read_text(encoding="utf-8"))


def write_sweep(path: Path, objective: str = "eval/speedup") -> Path:
    for name, number, status, overrides, value in JOBS:
        job = {
            "number": number,
            "status": status,
            "overrides": overrides,
            "objective": objective,
            "value": value,
        }
        if status == "failed":
            job["error"] = "UserError: </script><b>head.num_heads=99 is out of range"
        write(path / name / "job.json", job)
        if value is not None:
            interval = {f"{objective}_low": value - 0.2, f"{objective}_high": value + 0.2}
            metrics = {objective: value, "eval/tokens_per_step": 4.5, **interval}
            write(path / name / "metrics.json", metrics)
            stages = {"train": {"status": "done", "seconds": 61.5}}
            write(path / name / "run.json", {"name": "x", "stages": stages})
            (path / name / "report.html").write_text("")
    return path


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
