"""What a metric's name tells of it."""

import re

_SMALLER_IS_BETTER = {"loss", "nats", "perplexity", "seconds", "time", "memory", "outside"}
"""Words of a name, which `/` and `_` part."""
_TIMED = (
    "second",
    "speedup",
    "outside_backbone",
    "eval/time/",
    "baseline_vs_hf",
    "memory",
    "calibrate/",
)
"""Parts of names of metrics that no second run gives again to the digit: what the clock gives, or
is chosen by it."""
_STAGES = {"val": "train", "eval": "evaluate", "data": "inspect", "doctor": "inspect"}
"""First word of a name -> the stage that measures it, where it is not that stage's own name."""


def stage_of(metric: str) -> str:
    """Return the stage that measures a metric of this name."""
    first = metric.partition("/")[0]
    return _STAGES.get(first, first)


def is_larger_better(metric: str) -> bool:
    """Say which way a metric of this name is better."""
    return not _SMALLER_IS_BETTER.intersection(re.split(r"[/_]", metric))


def is_timed(metric: str) -> bool:
    """Say whether a metric of this name depends on the clock or the machine's memory."""
    return any(word in metric for word in _TIMED)
