"""The learning-rate schedule."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, warmup_fraction: float, max_steps: int) -> LambdaLR:
    """Rise linearly over a share of the steps, then fall to zero along a cosine.

    A group of the optimiser that `waits` so many steps has a rate of zero until then.
    """
    warmup_steps = max(1, round(warmup_fraction * max_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    waits = [group.get("waits", 0) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [lambda step, wait=w: factor(step) * (step >= wait) for w in waits])


def scheduled(optimizer: Optimizer, warmup_fraction: float, max_steps: int) -> dict[str, Any]:
    """Return the optimiser with its schedule, stepped once an optimiser step, for Lightning."""
    schedule = warmup_cosine(optimizer, warmup_fraction, max_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
