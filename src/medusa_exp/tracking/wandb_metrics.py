"""What W&B is told about metrics: what each is drawn against, and which of its values is best."""

import math
from collections.abc import Iterable
from typing import Any

from medusa_exp.runs.metric_table import is_larger_better

STEP_AXES = {"pretrain/*": "pretrain/step", "train/*": "train/step"}
BEST = (
    "val/accept_length",
    "val/accept_length_chain",
    "val/top1_head*",
    "val/top5_head*",
    "val/loss_head*",
)
"""Metrics of a validation: the best value is kept, and they are drawn against training's steps."""
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
    for pattern in BEST:
        better = "max" if is_larger_better(pattern) else "min"
        run.define_metric(pattern, step_metric="train/step", summary=better)


def best_values(history: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return `best/<metric>` of every metric of a validation in the rows of history.jsonl."""
    best: dict[str, float] = {}
    for row in history:
        for name, value in row.items():
            if any(_fits(name, pattern) for pattern in BEST) and math.isfinite(value):
                choose = max if is_larger_better(name) else min
                best[f"best/{name}"] = choose(value, best.get(f"best/{name}", value))
    return best


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
