"""The residual blocks of a head, each of which is the identity at the start.

D hidden, J drafted tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class ResBlock(nn.Module):
    """x + SiLU(Wx + b), with W = 0 and b = 0 at the start."""

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = _zero_linear(hidden_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return x + silu(self.linear(x))


class GroundedBlock(nn.Module):
    """A block that also sees the embeddings e of J tokens: x + Ve + SiLU(W[x, e] + b).

    After Ankner et al., "Hydra" (2024), section 3, but that x itself passes unchanged.
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
