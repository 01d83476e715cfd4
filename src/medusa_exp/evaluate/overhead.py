"""Where a step's time goes: how much of it is not the backbone's."""

import time
from typing import Any
from unittest.mock import patch

from medusa_exp.evaluate.methods import Method, synchronise, timed
from medusa_exp.model.backbone import Backbone


def share_outside_backbone(backbone: Backbone, method: Method, prompts: list[list[int]]) -> float:
    """Return the share of a method's time that passes outside the backbone's forward calls.

    That is proposing, verifying, keeping the cache, and all of Python between. On a GPU steps run
    op by op for this, and each call is waited for: the share is then an upper bound.
    """
    inside = 0.0
    forward = backbone.forward

    def timed_forward(*arguments: Any, **options: Any) -> Any:
        nonlocal inside
        synchronise(backbone.device)
        start = time.perf_counter()
        result = forward(*arguments, **options)
        synchronise(backbone.device)
        inside += time.perf_counter() - start
        return result

    op_by_op = patch.object(backbone, "decodes_statically", False)
    with op_by_op, patch.object(backbone, "forward", timed_forward):
        seconds = sum(timed(method, [prompt], backbone.device)[1] for prompt in prompts)
    return 1 - inside / seconds
