"""What the verification kernels are compared with, on the same inputs.

eager: the specification in torch. compiled: torch.compile of it. split: what serving engines do,
argmax or softmax by torch, then a walk of one thread a sequence (split_walk.cu), then the draw.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.points import Inputs, Point

from medusa_exp.decode.verify import Verdict, verify

_FIELDS = (
    "tokens parents targets p uniforms path num_accepted last place "
    "num_nodes vocab_size path_length"
).split()
_ARGUMENTS = np.dtype([(name, np.int64) for name in _FIELDS])


def options_of(point: Point, inputs: Inputs) -> dict[str, Any]:
    """Return the keyword arguments of `verify` for a point."""
    options: dict[str, Any] = {"rule": point.rule, "max_depth": inputs.tree.depth}
    if point.rule in ("sampling", "traversal"):
        options |= {"rule": "sampling", "uniforms_BN": inputs.uniforms_BN, "drawn": inputs.drawn}
    return options


def eager(point: Point, inputs: Inputs) -> Callable[[], Verdict]:
    """Return the rival `eager`."""
    options = options_of(point, inputs)
    return lambda: verify(inputs.logits_BNV, inputs.tokens_BN, inputs.parents_BN, **options)


def compiled(point: Point, inputs: Inputs) -> Callable[[], Verdict]:
    """Return the rival `compiled`; one compilation serves all shapes of a rule."""
    options = options_of(point, inputs)
    function = torch.compile(verify, dynamic=True)
    return lambda: function(inputs.logits_BNV, inputs.tokens_BN, inputs.parents_BN, **options)


class SplitWalk:
    """The rival `split`."""

    def __init__(self) -> None:
        import cupy

        source = Path(__file__).with_name("split_walk.cu").read_text("utf-8")
        module = cupy.RawModule(code=source)
        self._entries = {
            rule: module.get_function(f"walk_{rule}").kernel for rule in ("greedy", "sampling")
        }

    def __call__(self, point: Point, inputs: Inputs) -> Callable[[], Verdict]:
        """Return the method on a point's inputs."""
        device, width = inputs.logits_BNV.device, inputs.tree.depth + 1
        parents_BN = inputs.parents_BN.contiguous()
        row_B = torch.arange(point.batch, device=device)
        path_BL = torch.empty(point.batch, width, dtype=torch.long, device=device)
        num_accepted_B, last_B = (torch.empty_like(row_B) for _ in range(2))
        place_B = torch.empty(point.batch, device=device)

        def walk(targets: int, p: int) -> None:
            arguments = np.zeros(1, _ARGUMENTS)
            tensors = (inputs.uniforms_BN, path_BL, num_accepted_B, last_B, place_B)
            arguments[0] = (
                inputs.tokens_BN.data_ptr(),
                parents_BN.data_ptr(),
                targets,
                p,
                *(tensor.data_ptr() for tensor in tensors),
                point.nodes,
                point.vocab,
                width,
            )
            stream = torch.cuda.current_stream()
            entry = self._entries[point.rule]
            entry((point.batch, 1, 1), (1, 1, 1), (arguments,), stream=_Stream(stream.cuda_stream))

        def greedy() -> Verdict:
            targets_BN = inputs.logits_BNV.argmax(-1)
            walk(targets_BN.data_ptr(), 0)
            return Verdict(path_BL, num_accepted_B, targets_BN[row_B, last_B])

        def sampling() -> Verdict:
            p_BNV = (inputs.logits_BNV.float() / 1.0).softmax(-1)
            walk(0, p_BNV.data_ptr())
            ends_BV = p_BNV[row_B, last_B].cumsum(-1)
            next_B1 = torch.searchsorted(ends_BV, place_B[:, None], right=True)
            return Verdict(path_BL, num_accepted_B, next_B1[:, 0].clamp(max=point.vocab - 1))

        return greedy if point.rule == "greedy" else sampling


class _Stream:
    """What CuPy wants of a stream."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr
