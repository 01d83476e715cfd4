"""From a head's last block to logits. A projection is a module with

    forward(k, x_RD) -> logits_RW     of the head at index k (0 is head 1)
    start(lm_head, token_counts_V)    make it as near to the backbone's lm_head as it can be
    attach(lm_head)                   give it what it shares with the backbone, and does not save
    parameters_of(k)                  what the head at index k has of its own
    stacked(dtype) -> (x_KBD, count) -> logits_KBW    all heads at once, for decoding
    token_map                         ids of the W tokens that it knows, or None: all V of them

B batch, D hidden, V vocabulary, W tokens that the heads know, K heads, R rows, I and O widths.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from medusa_exp.model.heads.config import MedusaHeadsConfig

Stacked = Callable[[Tensor, int], Tensor]


class Projection(Protocol):
    """What the module's docstring says."""

    token_map: Tensor | None

    def __call__(self, k: int, x_RD: Tensor) -> Tensor: ...
    def start(self, lm_head: nn.Module, token_counts_V: Tensor | None) -> None: ...
    def attach(self, lm_head: nn.Module) -> None: ...
    def parameters_of(self, k: int) -> list[nn.Parameter]: ...
    def stacked(self, dtype: torch.dtype) -> Stacked: ...


class OwnProjections(nn.ModuleList):
    """A matrix [V, D] of its own for each head."""

    token_map = None

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__(
            nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
            for _ in range(config.num_heads)
        )

    def forward(self, k: int, x_RD: Tensor) -> Tensor:
        """Return logits_RV."""
        return self[k](x_RD)

    @torch.no_grad()
    def start(self, lm_head: nn.Module, token_counts_V: Tensor | None) -> None:
        """Copy the lm_head, bias and all."""
        bias = getattr(lm_head, "bias", None)
        for projection in self:
            projection.weight.copy_(lm_head.weight)
            if bias is not None:
                projection.bias.copy_(bias)

    def attach(self, lm_head: nn.Module) -> None:
        """Nothing is shared."""

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Return its matrix, and its bias."""
        return list(self[k].parameters())

    def stacked(self, dtype: torch.dtype) -> Stacked:
        """Return one batched product."""
        return stacked_linear(self, dtype)


class TiedProjection(nn.Module):
    """The backbone's own lm_head for all heads, frozen: there is nothing to train or to save."""

    token_map = None

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__()
        self._shared: tuple[nn.Module, ...] = ()  # in a tuple, lest it become a submodule

    def forward(self, k: int, x_RD: Tensor) -> Tensor:
        """Return logits_RV."""
        weight_VD, bias_V = self._weights()
        return linear(x_RD.to(weight_VD.dtype), weight_VD, bias_V)

    def start(self, lm_head: nn.Module, token_counts_V: Tensor | None) -> None:
        """Nothing is its own."""

    def attach(self, lm_head: nn.Module) -> None:
        """Share the lm_head."""
        self._shared = (lm_head,)

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Nothing is its own."""
        return []

    def stacked(self, dtype: torch.dtype) -> Stacked:
        """Return one product, for which the matrix is read once."""
        weight_VD, bias_V = self._weights()

        def project(x_KBD: Tensor, count: int) -> Tensor:
            return linear(x_KBD.to(weight_VD.dtype), weight_VD, bias_V)

        return project

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        if not self._shared:
            raise ValueError(
                "these heads share the lm_head of their backbone: load them with it, by "
                "load_heads(path, model)."
            )
        [lm_head] = self._shared
        bias = getattr(lm_head, "bias", None)
        return lm_head.weight.detach(), None if bias is None else bias.detach()


def stacked_linear(layers: Iterable[nn.Module], dtype: torch.dtype) -> Stacked:
    """Return the batched product of one linear layer a head."""
    layers = list(layers)
    weight_KIO = torch.stack([layer.weight.detach().T for layer in layers]).to(dtype).contiguous()
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias_K1O = torch.stack(biases)[:, None].to(dtype) if biases else None

    def apply(x_KBI: Tensor, count: int) -> Tensor:
        if bias_K1O is None:
            return torch.bmm(x_KBI, weight_KIO[:count])
        return torch.baddbmm(bias_K1O[:count], x_KBI, weight_KIO[:count])

    return apply
