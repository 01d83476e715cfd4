"""Smaller projections: matrices of low rank, or of the frequent tokens alone, or both.

D hidden, V vocabulary, W tokens that the heads know, S rank, K heads, R rows, B batch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.layers import Stacked, stacked_linear


class LowRankProjections(nn.Module):
    """For each head a matrix [W, D], or its factors [W, S] and [S, D].

    A token that is not among the W is never guessed: where it comes, a guess is wrong.
    """

    token_map: Tensor | None

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__()
        num_tokens = config.num_tokens or config.vocab_size
        width = config.rank or config.hidden_size
        heads = range(config.num_heads)
        self.down = nn.ModuleList(
            nn.Linear(config.hidden_size, width, bias=False) for _ in heads if config.rank
        )
        self.up = nn.ModuleList(
            nn.Linear(width, num_tokens, bias=config.lm_head_bias) for _ in heads
        )
        token_map = torch.zeros(num_tokens, dtype=torch.long) if config.num_tokens else None
        self.register_buffer("token_map", token_map)

    def forward(self, k: int, x_RD: Tensor) -> Tensor:
        """Return logits_RW."""
        return self.up[k](self.down[k](x_RD) if len(self.down) else x_RD)

    @torch.no_grad()
    def start(self, lm_head: nn.Module, token_counts_V: Tensor | None) -> None:
        """Take the lm_head's rows of the most frequent tokens, and the best factors of them.

        The best factors are those of its singular vectors: here of the eigenvectors of W'W, which
        is small where there are many tokens.
        """
        weight_WD = lm_head.weight.float()
        bias = getattr(lm_head, "bias", None)
        if self.token_map is not None:
            assert token_counts_V is not None
            order_V = token_counts_V.argsort(descending=True, stable=True)
            self.token_map.copy_(order_V[: len(self.token_map)].sort().values)
            weight_WD = weight_WD[self.token_map]
            bias = None if bias is None else bias[self.token_map]
        if len(self.down):
            _, vectors_DD = torch.linalg.eigh(weight_WD.T @ weight_WD)
            down_SD = vectors_DD[:, -self.down[0].out_features :].T
            for down in self.down:
                down.weight.copy_(down_SD)
            weight_WD = linear(weight_WD, down_SD)
        for up in self.up:
            up.weight.copy_(weight_WD)
            if bias is not None:
                up.bias.copy_(bias)

    def attach(self, lm_head: nn.Module) -> None:
        """Nothing is shared."""

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """Return its matrix or its factors, and its bias."""
        return [p for layers in (self.down, self.up) if len(layers) for p in layers[k].parameters()]

    def stacked(self, dtype: torch.dtype) -> Stacked:
        """Return one or two batched products."""
        up = stacked_linear(self.up, dtype)
        if not len(self.down):
            return up
        down = stacked_linear(self.down, dtype)
        return lambda x_KBD, count: up(down(x_KBD, count), count)
