"""Weight-only int8 quantization of heads' vocabulary projections, for drafting on a CPU.

A projection to the vocabulary is most of what a head reads, and a product of a few rows takes as
long as its matrix takes to read: in a quarter of the bytes of float32, a third to a half of the
time (`benchmarks/packed.py`). Logits change by about half a hundredth, and so does the order of
tokens that are nearly as likely. That may cost a draft token. It changes no law, for the model
checks every draft: greedy answers are the same, and sampling with a seed gives other draws of the
same distribution. Typical acceptance, which is lossy, may accept other tokens.

Symmetric, with one scale for each output, largest weight / 127, as the rows of LLM.int8 (Dettmers
et al., arXiv 2208.07339, section 2); inputs and outputs are rounded to bfloat16. Only who loads
heads to decode with them quantizes; heads that are trained, validated or exported are loaded anew.

M rows, K inputs, N outputs.
"""

import sys

import torch
from torch import Tensor, nn

_MOST_ROWS = 8
"""Of a product of more, arithmetic is the larger part, and slower in integers."""
_FEWEST_WEIGHTS, _MOST_WEIGHTS = 1 << 22, 1 << 31
"""Of a layer: 4,096 x 384 gained nothing in a model's order, 16,384 x 640 did; above, the product
may count too far."""
_INPUTS_MULTIPLE = 32
"""The product loads 16 inputs at a time, at places that are multiples of 32 bytes, and crashes at
others."""
_CAPABILITIES = ("AVX2", "AVX512")
"""Processors whose product of one row was measured to be faster than in float32, 2 to 3 times.
Without such instructions it takes twice as long; ARM has not been tried. In bfloat16 four rows take
longer already: such layers are left alone.
"""
_LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer of quantized weights [N, K]: in integers for a few rows, else in float32.

    A row is the same whatever stands beside it, but for rounding to bfloat16 where it is one of
    more than `_MOST_ROWS`.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        # No buffers: nobody saves them.
        self.integers_NK, self.scale_N = quantized(layer.weight.detach())
        weight_NK = self.integers_NK.float() * self.scale_N.float()[:, None]
        self.in_float = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        self.in_float.weight = nn.Parameter(weight_NK, requires_grad=False)
        if layer.bias is not None:
            self.in_float.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N] in float32."""
        x = x.float()
        rows = x.numel() // x.shape[-1]
        if 0 < rows <= _MOST_ROWS and not (torch.is_grad_enabled() and x.requires_grad):
            y = _product(x.reshape(rows, -1), self.integers_NK, self.scale_N)
            y = y.view(*x.shape[:-1], -1).float()
            bias = self.in_float.bias
            return y if bias is None else y + bias
        return self.in_float(x.bfloat16().float()).bfloat16().float()


def to_int8(layers: nn.ModuleList) -> bool:
    """Quantize linear layers where that makes them faster; return whether they are.

    Args:
        layers: of one shape, that nobody trains, such as the projections of all heads. Each is
            replaced; or, with False, none.
    """
    if not len(layers) or not all(map(_can_be_int8, layers)) or not is_supported():
        return False
    for place, layer in enumerate(layers):
        assert isinstance(layer, nn.Linear)
        layers[place] = Int8Linear(layer)
    return True


def is_supported() -> bool:
    """Has this torch the product, in a fast form for this processor?"""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _CAPABILITIES or sys.platform == "win32":  # built there without them
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
    return (weight_NK.float() / step_N1).round().to(torch.int8).contiguous(), scale_N


def _can_be_int8(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return False
    weight = layer.weight
    is_float32 = weight.device.type == "cpu" and weight.dtype == torch.float32
    is_in_range = _FEWEST_WEIGHTS <= weight.numel() < _MOST_WEIGHTS
    return is_float32 and is_in_range and weight.shape[1] % _INPUTS_MULTIPLE == 0


def _product(x_MK: Tensor, integers_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return [M, N] in bfloat16, of x in float32, whose copy lies as the product wants it."""
    multiply = torch.ops.aten._weight_int8pack_mm.default  # private: torch 2.13
    product_MN: Tensor = multiply(x_MK.bfloat16().contiguous(), integers_NK, scale_N)
    return product_MN
