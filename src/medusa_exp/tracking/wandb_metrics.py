"""What W&B is told about metrics: what each is drawn against, and which of its values is best."""

import math
from collections.abc import Iterable
from typing import Any

STEP_AXES = {"pretrain/*": "pretrain/step", "train/*": "train/step"}
BEST = {
    "val/accept_length": "max",
    "val/accept_length_chain": "max",
    "val/top1_head*": "max",
    "val/top5_head*": "max",
    "val/loss_head*": "min",
}
"""Metrics of a validation, and their better end. They are drawn against the step of training."""
AXES = {
    "by_head/*": "by_head/head",
    "by_depth/*": "by_depth/depth",
    "by_nodes/*": "by_nodes/num_nodes",
    "by_batch/*": "by_batch/batch_size",
}
"""Curves over something else than time: a row for each head, depth, size of tree and batch."""


def define_metrics(run: Any) -> None:
    """Give an open W&B run its axes and best values.

    While a run trains, its summary has the best value so far, as `val/accept_length.max`. At the
    end of a stage the numbers of metrics.json take their names, and `best/...` keeps the best.
    """
    for pattern, axis in {**STEP_AXES, **AXES}.items():
        run.define_metric(axis, hidden=True, summary="none" if pattern in AXES else None)
        run.define_metric(pattern, step_metric=axis, summary="none" if pattern in AXES else None)
    for pattern, better in BEST.items():
        run.define_metric(pattern, step_metric="train/step", summary=better)


def best_values(history: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return `best/<metric>` of every metric of a validation in the rows of history.jsonl."""
    best: dict[str, float] = {}
    for row in history:
        for name, value in row.items():
            if (better := _better_end(name)) and math.isfinite(value):
                choose = max if better == "max" else min
                best[f"best/{name}"] = choose(value, best.get(f"best/{name}", value))
    return best


def _better_end(name: str) -> str | None:
    return next((end for pattern, end in BEST.items() if _fits(name, pattern)), None)


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
