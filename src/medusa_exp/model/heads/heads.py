"""Medusa heads: K small networks that each guess one later token from one hidden state.

B batch, D hidden, V vocabulary, W tokens that the heads know (V, or fewer), K heads, R rows, J
drafted tokens. Head k (from 1) at position t guesses token t+1+k; the backbone's own lm_head gives
token t+1. After Cai et al., "Medusa" (2024), section 2.1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads.blocks import GroundedBlock, ResBlock
from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.layers import OwnProjections, Projection, TiedProjection
from medusa_exp.model.heads.lowrank import LowRankProjections
from medusa_exp.model.heads.prefix_attention import PrefixAttention


@dataclass(frozen=True)
class Family:
    """What the heads of one kind are made of."""

    projection: Callable[[MedusaHeadsConfig], Projection]
    """From the last block to logits; see `projections`."""
    block: Callable[[int, bool], nn.Module] = ResBlock
    """Of D and whether it has a bias; see `blocks`."""
    is_sequential: bool = False
    """Does a head see what is drafted before its own token? Its first block is a GroundedBlock."""
    min_layers: int = 0
    """Blocks without which there would be nothing to train, or nothing that sees these tokens."""


FAMILIES = {
    "medusa": Family(OwnProjections),
    "medusa_tied": Family(TiedProjection, min_layers=1),
    "medusa_lowrank": Family(LowRankProjections),
    "hydra": Family(OwnProjections, is_sequential=True, min_layers=1),
}
"""By `head.kind`."""
_NO_WORD = -100
"""What stands for a token that the heads do not know; cross entropy passes it over."""


class MedusaHeads(PreTrainedModel):
    """K heads of L residual blocks each, and what makes logits of them.

    All that training, calibration and decoding ask of a family is here.
    """

    config_class = MedusaHeadsConfig
    base_model_prefix = "medusa"

    def __init__(self, config: MedusaHeadsConfig) -> None:
        super().__init__(config)
        size, bias = config.hidden_size, config.bias
        family = FAMILIES[config.kind]
        self.is_sequential = family.is_sequential
        self.prefix: PrefixAttention | None = None
        """What makes of the backbone's hidden states those that the heads read."""
        if config.prefix_attention:
            self.prefix = PrefixAttention(size, config.num_attention_heads)
        self.blocks = nn.ModuleList()
        for k in range(config.num_heads):
            blocks = [family.block(size, bias) for _ in range(config.num_layers)]
            if self.is_sequential:
                blocks[0] = GroundedBlock(size, k + 1, bias)
            self.blocks.append(nn.Sequential(*blocks))
        self.lm_heads: Projection = family.projection(config)
        self._embedding: tuple[nn.Module, ...] = ()  # in a tuple, lest it become a submodule
        self.post_init()

    @property
    def num_heads(self) -> int:
        """K."""
        return self.config.num_heads

    def describe(self) -> str:
        """Return a few words about them."""
        number = sum(parameter.numel() for parameter in self.parameters())
        return f"{self.num_heads} heads of kind {self.config.kind}, {number / 1e6:.1f} M parameters"

    @property
    def token_map(self) -> Tensor | None:
        """Ids [W] of the tokens that the heads know; None if these are all."""
        return self.lm_heads.token_map

    def attach(self, backbone: Backbone) -> "MedusaHeads":
        """Give the heads what they share with the backbone, and neither train nor save."""
        self.lm_heads.attach(backbone.lm_head)
        if self.is_sequential:
            self._embedding = (backbone.model.get_input_embeddings(),)
        return self

    def forward(self, hidden_BD: Tensor, num_heads: int | None = None) -> Tensor:
        """Return logits_BKV of the first `num_heads` heads (all of them by default)."""
        used = range(self.num_heads if num_heads is None else num_heads)
        logits_BKW = torch.stack([self.head_logits(k, hidden_BD) for k in used], dim=-2)
        return self.over_vocabulary(logits_BKW)

    def head_logits(self, k: int, hidden_RD: Tensor, drafted_RJ: Tensor | None = None) -> Tensor:
        """Return logits_RW of the head at index k (0 is head 1).

        Args:
            k: which head.
            hidden_RD: the backbone's last hidden states, or what `prefix` has made of them.
            drafted_RJ: the k+1 tokens that follow each state, where `is_sequential`: the certain
                one, and a guess of each head before this one.
        """
        if not self.is_sequential:
            return self.lm_heads(k, self.blocks[k](hidden_RD))
        first, *others = self.blocks[k]
        x_RD = first(hidden_RD, self._embedded(drafted_RJ, k + 1).to(hidden_RD.dtype))
        for block in others:
            x_RD = block(x_RD)
        return self.lm_heads(k, x_RD)

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        """Return what the head at index k trains, and no other head."""
        return [*self.blocks[k].parameters(), *self.lm_heads.parameters_of(k)]

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Map [..., W] to [..., V]: minus infinity for each token that the heads do not know."""
        if self.token_map is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.token_map, logits)

    def words_of(self, tokens: Tensor) -> Tensor:
        """Return the places of tokens among the W, and -100 for those that are not there."""
        if self.token_map is None:
            return tokens
        place_V = tokens.new_full((self.config.vocab_size,), _NO_WORD)
        place_V[self.token_map] = torch.arange(len(self.token_map), device=tokens.device)
        return place_V[tokens]

    def of_words(self, logits_RV: Tensor) -> Tensor:
        """Map the backbone's logits to those of the W tokens."""
        return logits_RV if self.token_map is None else logits_RV[:, self.token_map]

    def _embedded(self, drafted_RJ: Tensor | None, number: int) -> Tensor:
        if not self._embedding or drafted_RJ is None:
            raise ValueError(
                "these heads see the tokens drafted before them: load them with their backbone, by "
                "load_heads(path, model), and decode with a tree."
            )
        [embedding] = self._embedding
        return embedding(drafted_RJ[:, :number]).detach().flatten(1)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what the constructors made: transformers would draw every Linear anew."""
