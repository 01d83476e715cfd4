"""In which form is a captured step fastest? Forms that have not been chosen by measurement yet.

`measure_forms` decodes with one model, its layers compiled in several ways; `measure_attention`
times the attention of one layer of a step by each of torch's kernels.

B rows, J key-value heads, G query heads for each, N nodes, K columns of the cache and the tree.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from gpu.decode_step import KINDS, decoder_of, step_milliseconds
from gpu.models import Scale, random_llama
from gpu.points import tree_of
from gpu.timing import measure, num_copies
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from medusa_exp.decode import compiled
from medusa_exp.model import build_heads
from medusa_exp.runs.machine import synchronize

HEAD = 128
FORMS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "as it is": nullcontext,
    "products of their own": lambda: mock.patch.object(compiled, "groups_of", return_value=[]),
    "masks of their own": lambda: mock.patch.object(
        compiled, "fold_for_layer", lambda layer, mask, dtype: mask
    ),
    "combo kernels": lambda: inductor.patch(
        combo_kernels=True, combo_kernel_foreach_dynamic_shapes=True
    ),
    "products of one row by Triton": lambda: inductor.patch(coordinate_descent_tuning=True),
    "dependent launches": lambda: inductor.patch({"triton.enable_pdl": True}),
}
"""What each changes, from what the product does. A rehearsal's backend knows of no kernels on a
CPU, so that the last three change nothing there; on an emulated GPU it compiles them, and neither
tunes nor overlaps any."""
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SHAPES = {"7B": (32, 1), "8B": (8, 4)}
"""J and G."""

IsOver = Callable[[], bool]


def measure_forms(name: str, scale: Scale, is_over: IsOver) -> Iterator[tuple[str, Any]]:
    """Yield for each form milliseconds of a plain step and of one over 16 nodes, and compilation's.

    The last is the first once more: what changes without a cause.
    """
    backbone = random_llama(scale.shapes[name], scale)
    nodes = scale.nodes[1]
    heads = build_heads(backbone, num_heads=tree_of(nodes).depth, kind=KINDS[name])
    heads = heads.to(backbone.device)
    for told, form in [*FORMS.items(), ("as it is, again", nullcontext)]:
        if is_over():
            yield "left_out", f"from {told} on"
            return
        torch._dynamo.reset()
        compiled._compiler.cache_clear()
        with form():
            decoder = decoder_of(backbone, heads, nodes, scale, True)
            found = {n: step_milliseconds(decoder, 1, n, scale) for n in (1, nodes)}
        layers = decoder.layers
        assert layers is not None
        yield (
            told,
            {
                **{f"{n} nodes": milliseconds for n, milliseconds in found.items()},
                "compilation_seconds": layers.seconds,
                "is_refused": layers.is_refused,
            },
        )


@dataclass(frozen=True)
class Attention:
    """The attention of one layer in one step."""

    batch: int
    heads: int
    groups: int
    nodes: int
    columns: int

    def inputs(self, scale: Scale) -> tuple[Tensor, ...]:
        """Return queries, folded as model/attention.py does, keys, values, and what is added."""
        rows, made = self.groups * self.nodes, {"device": scale.device, "dtype": scale.dtype}
        query = torch.randn(self.batch, self.heads, rows, HEAD, **made)
        key, value = torch.randn(2, self.batch, self.heads, self.columns, HEAD, **made)
        width = self.columns + -self.columns % 16  # aligned
        mask = torch.zeros(self.batch, 1, rows if self.nodes > 1 else 1, width, **made)
        return query, key, value, mask[..., : self.columns]

    def copies(self, scale: Scale) -> int:
        """Return how many inputs no cache holds."""
        if scale.is_rehearsal:
            return 2
        bytes_ = 2 * self.batch * self.heads * self.columns * HEAD * scale.dtype.itemsize
        return num_copies(bytes_, torch.cuda.get_device_properties(0).L2_cache_size)


def measure_attention(scale: Scale, is_over: IsOver) -> Iterator[tuple[str, Any]]:
    """Yield microseconds of a layer's attention in a graph with cold caches, by every kernel."""
    sizes = product(SHAPES.items(), scale.batches[:2], (1, *scale.nodes[1:3]))
    for (name, (heads, groups)), batch, nodes in sizes:
        told = f"{name}, B={batch}, {nodes} nodes"
        if is_over():
            yield "left_out", f"from {told} on"
            return
        case = Attention(batch, heads, groups, nodes, scale.past + 256 + nodes)
        yield told, dict(_by_each(case, scale))


def measure_first_calls(scale: Scale, is_over: IsOver) -> Iterator[tuple[str, Any]]:
    """Yield milliseconds of a prompt's attention at lengths that its kernel has not met, by each.

    Of cuDNN's kernel most is a plan, which model/attention.py leaves to calls of few shapes.
    """
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, **BACKENDS}
    for number, (name, backend) in enumerate(kernels.items()):
        if is_over():
            return
        lengths = [301 + 10 * number + 97 * place for place in range(5)]
        with sdpa_kernel([backend]):
            found = [_first_call(length, scale) for length in lengths]
        yield f"first call, {name}", found


def _first_call(length: int, scale: Scale) -> float | str:
    query, key, value = torch.randn(3, 1, 8, length, HEAD, device=scale.device, dtype=scale.dtype)
    synchronize(scale.device)
    start = time.perf_counter()
    try:
        scaled_dot_product_attention(query, key, value, is_causal=True)
    except RuntimeError as error:
        return f"{error}".partition("\n")[0][:200]
    synchronize(scale.device)
    return (time.perf_counter() - start) * 1e3


def _by_each(case: Attention, scale: Scale) -> Iterator[tuple[str, float | str]]:
    given = [case.inputs(scale) for _ in range(case.copies(scale))]
    for told, backend in BACKENDS.items():
        with sdpa_kernel([backend]):
            found = _microseconds(_masked, given)
        yield told, found
    if not scale.is_rehearsal:  # it wants Triton, and takes minutes on an emulated GPU
        yield "flex", _microseconds(torch.compile(_by_flex, dynamic=False), given)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _by_flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    rows = mask.shape[2]

    def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + mask[b, 0, i if rows > 1 else 0, j]

    return flex_attention(q, k, v, score_mod=added)


def _microseconds(attend: Callable[..., Any], given: list[tuple[Tensor, ...]]) -> float | str:
    try:
        return measure([partial(attend, *one) for one in given], repeats=5)["graph_cold"]
    except Exception as error:  # of a kernel that does not take these shapes, or of its compiler
        return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
