"""Weight-only int8 quantization of heads' vocabulary projections, for drafting on a CPU.

A projection to the vocabulary is most of what a head reads, and a product of a few rows takes as
long as its matrix takes to read: in a quarter of the bytes, a third to a half of the time
(`benchmarks/packed.py`). Logits change by about half a hundredth, and so does the order of tokens
that are nearly as likely. That may cost a draft token. It changes no law, for the model checks
every draft: greedy answers are the same, and sampling with a seed gives other draws of the same
distribution. Typical acceptance, which is lossy, may accept other tokens.

Symmetric, with one scale for each output, largest weight / 127, as the rows of LLM.int8 (Dettmers
et al., arXiv 2208.07339, section 2); inputs are rounded to bfloat16. Only who loads heads to decode
with them quantizes; state dicts hold the weights as they were.

M rows, K inputs, N outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_MOST_ROWS = 8
"""Of a product of more, arithmetic is the larger part, and slower in integers."""
_FEWEST_WEIGHTS = 1 << 18
"""Of a layer; below, its calls cost more than the reading."""
_INPUTS_MULTIPLE = 32
"""The product reads 16 inputs at a time, and would read beyond the end of others."""
_CAPABILITIES = ("AVX2", "AVX512")
"""Processors whose product of one row was measured to be faster, 2 to 3 times. Without such
instructions it takes twice as long as one of float32; ARM has not been tried.
"""
_LARGEST = 127


class Int8Linear(nn.Linear):
    """What `to_int8` makes of a `Linear`, in place; its weight stays, for products of many rows.

    A row is the same whatever stands beside it, as long as no more than `_MOST_ROWS` are asked for:
    with more it is the float product, and sampled drafts of a seed may differ.
    """

    integers_NK: Tensor
    scale_N: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N] in the dtype of x."""
        rows = x.numel() // self.in_features
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if not 0 < rows <= _MOST_ROWS or needs_gradient:
            return linear(x, self.weight, self.bias)
        x_MK = x.reshape(rows, self.in_features)
        y = _product(x_MK, self.integers_NK, self.scale_N).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def to_int8(layers: Sequence[nn.Module]) -> bool:
    """Quantize linear layers in place where that makes them faster; return whether they are.

    Args:
        layers: with weights [N, K] of one shape and dtype that nobody trains, such as the
            projections of all heads. False leaves all of them as they were.
    """
    found = [layer for layer in layers if type(layer) is nn.Linear and _can_be_int8(layer)]
    if not found or len(found) < len(layers) or not is_supported():
        return False
    for layer in found:
        integers_NK, scale_N = quantized(layer.weight.detach())
        layer.__class__ = Int8Linear
        # No buffers: nobody saves them.
        layer.__dict__.update(integers_NK=integers_NK, scale_N=scale_N)
    return True


def is_supported() -> bool:
    """Has this torch the product, in a fast form for this processor?"""
    if torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES:
        return False
    arguments = torch.ones(1, _INPUTS_MULTIPLE), *quantized(torch.ones(8, _INPUTS_MULTIPLE))
    try:
        _product(*arguments)
    except (AttributeError, RuntimeError):  # a private operator, which may go
        return False
    return True


def quantized(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers_NK (int8) and scale_N (bfloat16), whose product is the weight, nearly."""
    largest_N = weight_NK.abs().amax(1).float()
    # A little more, lest rounding to bfloat16 leave the largest weight above 127 steps.
    scale_N = (largest_N * (1 + 2**-7) / _LARGEST).bfloat16()
    step_N1 = torch.where(scale_N > 0, scale_N.float(), 1.0)[:, None]
    return (weight_NK.float() / step_N1).round().to(torch.int8), scale_N


def _can_be_int8(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_float = weight.device.type == "cpu" and weight.is_floating_point()
    is_large = weight.numel() >= _FEWEST_WEIGHTS
    return is_float and is_large and weight.shape[1] % _INPUTS_MULTIPLE == 0


def _product(x_MK: Tensor, integers_NK: Tensor, scale_N: Tensor) -> Tensor:
    multiply = torch.ops.aten._weight_int8pack_mm.default  # private: torch 2.13
    product_MN: Tensor = multiply(x_MK.bfloat16(), integers_NK, scale_N)
    return product_MN
