"""What a metric's name tells of it: its stage, its better end, whether it depends on timing.

All is read off words in the name, so a new metric is sorted by how it is called: where no word
below fits it, larger is better, and two runs of one config on a CPU are expected to agree on it.
"""

import re

PARTS_OF_TIME = {
    "prompt": "backbone, on the prompts",
    "backbone": "backbone, on trees",
    "heads": "heads and drafting",
    "mask": "masks of the trees",
    "verification": "verification",
    "cache": "keeping what is accepted",
    "rest": "all else",
}
"""NAME of each `eval/time/NAME`, which `evaluate/step_profile.py` measures, and what it is called;
in the order in which they come up. The rest is Python between them."""
_SMALLER_IS_BETTER = {"loss", "nats", "perplexity", "seconds", "time", "memory", "outside"}
"""Whole words of a name, which `/` and `_` separate: any of them turns the direction."""
_TIMED = (
    "second",
    "speedup",
    "outside_backbone",
    "eval/time/",
    "baseline_vs_hf",
    "memory",
    "calibrate/",
    "num_nodes",
)
"""Texts inside the names of metrics that no second run gives again to the digit: what the clock or
the machine's memory gives, or what is chosen by it, as the calibrated tree is."""
_STAGES = {"val": "train", "eval": "evaluate", "data": "inspect", "doctor": "inspect"}
"""First word of a name -> the stage that measures it, where it is not that stage's own name."""


def stage_of(metric: str) -> str:
    """Return the stage that measures a metric of this name."""
    first = metric.partition("/")[0]
    return _STAGES.get(first, first)


def is_larger_better(metric: str) -> bool:
    """Say whether a larger value of a metric of this name is better."""
    return not _SMALLER_IS_BETTER.intersection(re.split(r"[/_]", metric))


def is_timed(metric: str) -> bool:
    """Say whether a metric of this name may differ between two equal runs; see `_TIMED`."""
    return any(word in metric for word in _TIMED)
