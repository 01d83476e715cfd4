"""Projections of heads in 8-bit integers, for drafting on a CPU.

A head's projection to the vocabulary is most of what drafting reads, and a product of a few rows
takes as long as its matrix takes to read: in a quarter of the bytes, a third to a half of the time.
What heads say changes by less than a hundredth, and so does the order of tokens that are nearly as
likely. That may cost a draft token; it cannot change what is decoded, for the model checks every
draft.

Each output's weights have a scale; inputs are rounded to bfloat16. Heads that are trained,
validated or saved stay as they are.

M rows, K inputs, N outputs.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_MOST_ROWS = 8
"""Of a product of more, arithmetic is the larger part, and slower in integers."""
_FEWEST = 1 << 18
"""Weights of a layer below which its calls cost more than the reading."""
_MULTIPLE = 32
"""Of inputs: the product reads as many at a time, and beyond the end of others."""
_TRIES = 5
_WORTH = 0.8
"""What integers may take, of what numbers take, to be worth drafts that differ a little."""
_LARGEST = 127


class Int8Linear(nn.Linear):
    """What `to_int8` makes of a `Linear`, in place; its weight stays, for products of many rows."""

    integers_NK: Tensor
    scale_N: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        rows = x.numel() // self.in_features
        if not 0 < rows <= _MOST_ROWS:
            return linear(x, self.weight, self.bias)
        x_MK = x.reshape(rows, self.in_features)
        y = _product(x_MK, self.integers_NK, self.scale_N).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def to_int8(layers: Sequence[nn.Module]) -> bool:
    """Let linear layers on a CPU take integers, if that is faster; return whether they do.

    Args:
        layers: of one shape and dtype, not to be trained, such as the projections of all heads.
    """
    found = [layer for layer in layers if type(layer) is nn.Linear and _can_be_int8(layer)]
    if not found or len(found) < len(layers) or not _is_supported():
        return False
    rounded = [_rounded(layer.weight.detach()) for layer in found]
    if not _is_faster(found, rounded):
        return False
    for layer, (integers_NK, scale_N) in zip(found, rounded, strict=True):
        layer.__class__ = Int8Linear
        # No buffers: nobody saves them.
        layer.__dict__.update(integers_NK=integers_NK, scale_N=scale_N)
    return True


def _can_be_int8(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_number = weight.device.type == "cpu" and weight.is_floating_point()
    return is_number and weight.numel() >= _FEWEST and weight.shape[1] % _MULTIPLE == 0


def _is_supported() -> bool:
    try:
        _product(torch.ones(1, _MULTIPLE), *_rounded(torch.ones(8, _MULTIPLE)))
    except (AttributeError, RuntimeError):  # a torch that no longer has this product
        return False
    return True


def _rounded(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers_NK and scale_N, whose product is the weight, nearly."""
    largest_N = weight_NK.abs().amax(1).float()
    # Rounded to what a bfloat16 holds, and up a little before: no integer is above the largest.
    scale_N = (largest_N * (1 + 2**-7) / _LARGEST).bfloat16()
    step_N1 = torch.where(scale_N > 0, scale_N.float(), 1.0)[:, None]
    return (weight_NK.float() / step_N1).round().to(torch.int8), scale_N


def _product(x_MK: Tensor, integers_NK: Tensor, scale_N: Tensor) -> Tensor:
    multiply = torch.ops.aten._weight_int8pack_mm.default  # private: torch 2.13
    product_MN: Tensor = multiply(x_MK.bfloat16(), integers_NK, scale_N)
    return product_MN


@torch.inference_mode()
def _is_faster(layers: Sequence[nn.Linear], rounded: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Compare a row's way through all layers, one after the other, as a step takes it."""
    x_1K = torch.ones(1, layers[0].in_features, dtype=layers[0].weight.dtype)
    before = _least_seconds(lambda: [linear(x_1K, layer.weight) for layer in layers])
    after = _least_seconds(lambda: [_product(x_1K, *one) for one in rounded])
    return after <= _WORTH * before


def _least_seconds(run: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(seconds() for _ in range(_TRIES))
