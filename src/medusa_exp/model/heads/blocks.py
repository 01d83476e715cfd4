"""The residual blocks of a head, each the identity at the start. A block is a module with

    forward(x) -> x    [..., D] each
    stacked(blocks, dtype) -> (x_KBD, count) -> x_KBD    one of each head at once, for decoding

B batch, D hidden, K heads, J drafted tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from medusa_exp.model.heads.layers import Stacked, stacked_linear


class ResBlock(nn.Module):
    """x + SiLU(Wx + b), with W = 0 and b = 0 at the start."""

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = _zero_linear(hidden_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return x + silu(self.linear(x))

    @staticmethod
    def stacked(blocks: Sequence["ResBlock"], dtype: torch.dtype) -> Stacked:
        """Return a block of each head as one batched product."""
        linear = stacked_linear([block.linear for block in blocks], dtype)
        return lambda x_KBD, count: x_KBD + silu(linear(x_KBD, count))


class GroundedBlock(nn.Module):
    """A block that also sees the embeddings e of J tokens: x + Ve + SiLU(W[x, e] + b).

    After Ankner et al., "Hydra" (2024), section 3, but that x itself passes unchanged. Heads that
    have it run one after the other, so that there is no stacked form.
    """

    def __init__(self, hidden_size: int, num_tokens: int, bias: bool = True) -> None:
        super().__init__()
        self.skip = _zero_linear(num_tokens * hidden_size, hidden_size, bias=False)
        self.linear = _zero_linear((1 + num_tokens) * hidden_size, hidden_size, bias)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Map [..., D] and [..., J * D] to [..., D]."""
        return x + self.skip(embedded) + silu(self.linear(torch.cat([x, embedded], -1)))


def _zero_linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.zeros_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
