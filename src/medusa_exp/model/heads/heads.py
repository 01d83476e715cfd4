"""Medusa heads: K small networks that each predict one later token from one hidden state.

Head k (from 1) at position t predicts token t+1+k; the backbone's own lm_head predicts token t+1.
After Cai et al., "Medusa" (2024), section 2.1. In speculative decoding their predictions are the
draft tokens, which the backbone verifies. Here are the table of families, the heads as they are
trained and saved (`MedusaHeads`), stacked for decoding (`StackedHeads`), and fresh (`build_heads`).

B batch, D hidden, V vocabulary, W head vocabulary (all V tokens, or the frequent ones), K heads, R
rows, J draft tokens.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads.config import MedusaHeadsConfig
from medusa_exp.model.heads.layers import (
    GroundedBlock,
    LowRankProjections,
    Projection,
    RecurrentBlock,
    ResBlock,
    TiedProjection,
    UntiedProjections,
)
from medusa_exp.model.heads.prefix_attention import PrefixAttention, attention_heads


@dataclass(frozen=True)
class Family:
    """What the heads of one kind are made of; the two contracts stand at the top of `layers`."""

    projection: Callable[[MedusaHeadsConfig], Projection]
    """Makes the projection from the last block to logits."""
    block: Callable[[int, bool], nn.Module] = ResBlock
    """Makes a residual block of width D, with a bias or without."""
    is_sequential: bool = False
    """Does a head see the draft tokens before its own? Then its first block is a GroundedBlock."""
    is_recurrent: bool = False
    """Do all heads share their blocks, of which the first is a RecurrentBlock? Head k is what they
    make of the hidden state in k steps, one for each token that it sees."""
    sees_root: bool = False
    """Do all heads read what one RecurrentBlock makes of hidden state and root, the token that the
    state gave? They run side by side none the less."""
    min_layers: int = 0
    """Blocks without which there would be nothing to train, or nothing that sees draft tokens."""


def _of_recurrent(config: MedusaHeadsConfig) -> Projection:
    return LowRankProjections(config, is_shared=not config.own_projections)


FAMILIES = {
    "medusa": Family(UntiedProjections),
    "medusa_tied": Family(TiedProjection, min_layers=1),
    "medusa_lowrank": Family(LowRankProjections),
    "hydra": Family(UntiedProjections, is_sequential=True, min_layers=1),
    "rooted": Family(LowRankProjections, sees_root=True),
    "recurrent": Family(_of_recurrent, is_sequential=True, is_recurrent=True, min_layers=1),
}
"""The families by `head.kind`."""
LOW_RANK = ("medusa_lowrank", "rooted", "recurrent")
"""Families whose projections may be of low rank."""
_FREQUENT = (*LOW_RANK, "medusa_tied")
"""Families that may have a head vocabulary of the most frequent tokens alone."""
LARGE_VOCABULARY = 16_384
"""Tokens above which separate projections are most of what the heads read and hold."""
FREQUENT_TOKENS = 16_384
"""Head vocabulary that head.kind=auto takes of a large one: counted on 780 answers of a model of
262,144, in several languages, so many are 94 % of the tokens of its other answers."""
_LACKS_TOKENS = (
    "these heads see tokens that follow a state: load them with their backbone, by "
    "load_heads(path, model), and decode with a tree."
)
_NOT_IN_HEAD_VOCAB = -100
"""Label of a token outside the head vocabulary; cross entropy ignores it."""


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
        self.is_sequential, self.is_recurrent = family.is_sequential, family.is_recurrent
        self.prefix: PrefixAttention | None = None
        """Attention over the backbone's hidden states that gives those which the heads read."""
        if config.prefix_attention:
            self.prefix = PrefixAttention(size, config.num_attention_heads)
        self.root_block: RecurrentBlock | None = None
        """What makes of a hidden state and the root what all heads read: see `with_root`."""
        if family.sees_root:
            self.root_block = RecurrentBlock(size, bias)
        self.blocks = nn.ModuleList()
        for k in range(1 if self.is_recurrent else config.num_heads):
            blocks = [family.block(size, bias) for _ in range(config.num_layers)]
            if self.is_recurrent:
                blocks[0] = RecurrentBlock(size, bias)
            elif self.is_sequential:
                blocks[0] = GroundedBlock(size, k + 1, bias)
            self.blocks.append(nn.Sequential(*blocks))
        self.lm_heads: Projection = family.projection(config)
        self._embedding: tuple[nn.Module, ...] = ()  # in a tuple, lest it become a submodule
        self.post_init()

    @property
    def num_heads(self) -> int:
        """K."""
        return self.config.num_heads

    @property
    def sees_tokens(self) -> bool:
        """Do heads read more than a state: the root, or drafted tokens too (`is_sequential`)?"""
        return self.is_sequential or self.root_block is not None

    def describe(self) -> str:
        """Return a few words about them."""
        number = sum(parameter.numel() for parameter in self.parameters())
        size = f"{number / 1e6:.1f} million" if number >= 1e5 else f"{number:,}"
        kind = f"{self.num_heads} heads of kind {self.config.kind}"
        if self.is_recurrent:
            kind += ", a projection each" if self.config.own_projections else ", one projection"
        return f"{kind}, {size} parameters"

    @property
    def token_map(self) -> Tensor | None:
        """Token ids [W] of the head vocabulary; None if it is the whole vocabulary."""
        return self.lm_heads.token_map

    def attach(self, backbone: Backbone) -> "MedusaHeads":
        """Give the heads what they share with the backbone, and neither train nor save."""
        self.lm_heads.attach(backbone)
        if self.sees_tokens:
            self._embedding = (backbone.model.get_input_embeddings(),)
        return self

    def forward(
        self,
        hidden_BD: Tensor,
        num_heads: int | None = None,
        root_B: Tensor | None = None,
        *,
        in_head_vocab: bool = False,
    ) -> Tensor:
        """Return logits_BKV [B, K, V], minus infinity outside the head vocabulary.

        Args:
            hidden_BD: the backbone's last hidden states [B, D].
            num_heads: K, how many heads from the first on; all of them by default.
            root_B: the token after each state [B], which heads that see the root need.
            in_head_vocab: return logits_BKW [B, K, W] instead, in the order of `token_map`.

        Raises:
            ValueError: heads see drafted tokens (`is_sequential`), or the root, which is not given.
        """
        used = range(self.num_heads if num_heads is None else num_heads)
        if self.is_sequential:
            raise ValueError(_LACKS_TOKENS)
        if self.root_block is not None:
            hidden_BD = self.with_root(hidden_BD, root_B)
        logits_BKW = torch.stack([self.logits_of_states(k, hidden_BD) for k in used], dim=-2)
        return logits_BKW if in_head_vocab else self.over_vocabulary(logits_BKW)

    def head_logits(self, k: int, hidden_RD: Tensor, drafted_RJ: Tensor | None = None) -> Tensor:
        """Return logits_RW of the head at index k (0 is head 1).

        Args:
            k: which head.
            hidden_RD: the backbone's last hidden states, or what `prefix` has made of them.
            drafted_RJ: the k+1 tokens that follow each state, where `is_sequential`: the root,
                which is certain, and a draft token of each head before this one. Of heads that see
                the root alone, only that is read.
        """
        if not self.sees_tokens:
            return self.logits_of_states(k, hidden_RD)
        if drafted_RJ is None:
            raise ValueError(_LACKS_TOKENS)
        if self.root_block is not None:
            return self.logits_of_states(k, self.with_root(hidden_RD, drafted_RJ[:, 0]))
        seen_RJ = drafted_RJ[:, : k + 1]
        if self.is_recurrent:
            for token_R in seen_RJ.unbind(1):
                hidden_RD = self.advance(hidden_RD, token_R)
            return self.lm_heads(k, hidden_RD)
        first, *others = self.blocks[k]
        x_RD = first(hidden_RD, _embedded(self._embedding, seen_RJ, hidden_RD.dtype).flatten(1))
        for block in others:
            x_RD = block(x_RD)
        return self.lm_heads(k, x_RD)

    def logits_of_states(self, k: int, states_RD: Tensor) -> Tensor:
        """Return logits_RW of the head at index k where heads run side by side.

        They are of what these heads read: `with_root`'s states, or the hidden ones.
        """
        return self.lm_heads(k, self.blocks[k](states_RD))

    def with_root(self, hidden_RD: Tensor, root_R: Tensor | None) -> Tensor:
        """Return the states [R, D] that heads which see the root read."""
        assert self.root_block is not None
        return self.root_block(hidden_RD, _embedded(self._embedding, root_R, hidden_RD.dtype))

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Return the states [..., D] after one token more [...], where `is_recurrent`.

        The first state is the hidden state, the first token the root. `lm_heads` makes of the state
        after k tokens the logits of head k.
        """
        first, *others = self.blocks[0]
        state = first(state, _embedded(self._embedding, tokens, state.dtype))
        for block in others:
            state = block(state)
        return state

    def copied(self, dtype: torch.dtype) -> "MedusaHeads":
        """Return a copy in another dtype, that shares with the backbone what these share."""
        shared = {id(module): module for module in self._embedding}
        copy: MedusaHeads = deepcopy(self, shared).to(dtype)
        return copy

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        """Return what the head at index k trains; no other head does, unless they share it.

        What stands before all heads (`prefix`, `root_block`) is not among it.
        """
        return [
            *self.blocks[0 if self.is_recurrent else k].parameters(),
            *self.lm_heads.parameters_of(k),
        ]

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Map [..., W] to [..., V]: minus infinity for tokens outside the head vocabulary."""
        if self.token_map is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.token_map, logits)

    def to_head_vocab(self, tokens: Tensor) -> Tensor:
        """Map token ids to places in the head vocabulary, -100 where they are not in it."""
        if self.token_map is None:
            return tokens
        place_V = tokens.new_full((self.config.vocab_size,), _NOT_IN_HEAD_VOCAB)
        place_V[self.token_map] = torch.arange(len(self.token_map), device=tokens.device)
        return place_V[tokens]

    def from_head_vocab(self, logits_RV: Tensor) -> Tensor:
        """Pick from the backbone's logits those of the head vocabulary: [R, W]."""
        return logits_RV if self.token_map is None else logits_RV[:, self.token_map]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what the constructors made: transformers would draw every Linear anew."""


class StackedHeads(nn.Module):
    """The same heads for decoding, all at once on one hidden state.

    Most layers are one tensor of all heads, and take a half to a quarter of the time that they take
    one by one. Those that `stacked_linear` leaves apart are the very layers of `heads`. In another
    dtype draft tokens may differ in a near-tie; what is decoded does not, for draft tokens are only
    proposals.
    """

    is_sequential = False

    def __init__(self, heads: MedusaHeads, dtype: torch.dtype) -> None:
        super().__init__()
        assert not heads.is_sequential
        self.root_block = (
            deepcopy(heads.root_block).to(dtype) if heads.root_block is not None else None
        )
        self._embedding = heads._embedding
        self.config, self.num_heads, self.dtype = heads.config, heads.num_heads, dtype
        self.prefix = deepcopy(heads.prefix).to(dtype) if heads.prefix is not None else None
        self.layers = nn.ModuleList(
            blocks[0].stacked(blocks, dtype) for blocks in zip(*heads.blocks, strict=True)
        )
        self.project = heads.lm_heads.stacked(dtype)
        self.over_vocabulary, self.token_map = heads.over_vocabulary, heads.token_map

    @torch.no_grad()
    def forward(
        self,
        hidden_BD: Tensor,
        num_heads: int | None = None,
        root_B: Tensor | None = None,
        *,
        in_head_vocab: bool = False,
    ) -> Tensor:
        """Return logits_BKV, or logits_BKW: see `MedusaHeads.forward`."""
        count = self.num_heads if num_heads is None else num_heads
        x_BD = hidden_BD.to(self.dtype)
        if self.root_block is not None:
            x_BD = self.root_block(x_BD, _embedded(self._embedding, root_B, self.dtype))
        x_KBD = x_BD.expand(count, -1, -1)
        for layer in self.layers:
            x_KBD = layer(x_KBD, count)
        logits_BKW = self.project(x_KBD, count).transpose(0, 1)
        return logits_BKW if in_head_vocab else self.over_vocabulary(logits_BKW)


def _embedded(
    embedding: tuple[nn.Module, ...], tokens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the backbone's embeddings [..., D] of tokens [...], which get no gradient."""
    if not embedding or tokens is None:
        raise ValueError(_LACKS_TOKENS)
    vectors: Tensor = embedding[0](tokens)
    return vectors.detach().to(dtype)


def stack_heads(heads: MedusaHeads, backbone: Backbone) -> StackedHeads | MedusaHeads:
    """Make heads ready for decoding with a backbone: on a GPU in its dtype, for half the reading.

    Elsewhere they keep theirs (`load_heads` gives them the backbone's). Sequential heads are run
    one after the other, and come back as they are, or as a copy in that dtype. Others may share
    layers with `heads`, which packing then changes: load those anew to train or to save.
    """
    dtype = backbone.model.dtype if backbone.device.type == "cuda" else heads.dtype
    if not heads.is_sequential:
        return StackedHeads(heads, dtype)
    return heads if heads.dtype == dtype else heads.copied(dtype)


def head_vocabulary(heads: nn.Module) -> Tensor | None:
    """Return the token ids [W] that heads have logits of; None of all V, and of others' heads."""
    return heads.token_map if isinstance(heads, MedusaHeads | StackedHeads) else None


def from_head_places(heads: nn.Module, places: Tensor) -> Tensor:
    """Return the token ids [...] at these places [...] of the head vocabulary."""
    token_map = head_vocabulary(heads)
    return places if token_map is None else token_map[places]


def family_for(
    kind: str, vocab_size: int, num_tokens: int | None, *, can_share: bool
) -> tuple[str, int | None]:
    """Return the family and the head vocabulary that `head.kind` and `head.num_tokens` stand for.

    auto is recurrent over frequent tokens where the vocabulary is large, else rooted: on a model of
    262,144 tokens the first made most tokens a step for what they cost to train, and on a model of
    1,024 the second made more than medusa at the same speed.

    Args:
        kind: as in the config.
        vocab_size: V.
        num_tokens: as in the config; None leaves it to auto.
        can_share: may heads share what lies in the backbone?
    """
    if kind != "auto":
        return kind, num_tokens
    if num_tokens is not None:
        return ("recurrent" if can_share else "medusa_lowrank"), num_tokens
    if not can_share:
        return "medusa", None
    if vocab_size <= LARGE_VOCABULARY:
        return "rooted", None
    return "recurrent", FREQUENT_TOKENS


def own_projections_for(
    kind: str, vocab_size: int, num_tokens: int | None, asked: bool | None
) -> bool | None:
    """Say whether each head of kind recurrent has its own projection; None of other kinds.

    Args:
        kind: not auto.
        vocab_size: V.
        num_tokens: of the head vocabulary, None for all of V.
        asked: as in the config; None is yes where the head vocabulary is no large one.
    """
    if not FAMILIES[kind].is_recurrent:
        return None
    width = min(num_tokens or vocab_size, vocab_size)
    return width <= LARGE_VOCABULARY if asked is None else asked


def reads_whole_vocabulary(config: MedusaHeadsConfig) -> bool:
    """Has each head a whole matrix [V, D] of its own?"""
    is_one = FAMILIES[config.kind].is_recurrent and not config.own_projections
    is_own = config.kind != "medusa_tied" and not is_one
    return is_own and config.rank is None and config.num_tokens is None


def advice_on_cost(heads: MedusaHeads | StackedHeads, share: float) -> str | None:
    """Say what a large vocabulary costs heads with separate projections; None where it does not.

    Args:
        heads: that were timed.
        share: of a decoding step that they take.
    """
    config = heads.config
    if not reads_whole_vocabulary(config) or config.vocab_size <= LARGE_VOCABULARY:
        return None
    return (
        f"the heads take {share:.0%} of a step (eval/time/heads): each reads a projection of its "
        f"own to {config.vocab_size:,} tokens. head=recurrent head.num_tokens={FREQUENT_TOKENS} "
        "reads those of frequent tokens alone; head=medusa_tied shares the backbone's lm_head: "
        "train with one of them and compare eval/speedup"
    )


def build_heads(
    model: PreTrainedModel | Backbone,
    *,
    num_heads: int,
    num_layers: int = 1,
    kind: str = "medusa",
    bias: bool = True,
    rank: int | None = None,
    num_tokens: int | None = None,
    own_projections: bool | None = None,
    prefix_attention: bool = False,
    token_counts: Tensor | None = None,
) -> MedusaHeads:
    """Build fresh float32 heads that fit a backbone, on its device.

    Every projection starts as the backbone's lm_head, scaled as its logits are, or as near to it as
    it can, so that at step 0 each head predicts what the backbone predicts one place earlier: far
    better than random, and soon better than that.

    Args:
        model: the backbone.
        num_heads: K.
        num_layers: residual blocks of each head; medusa_tied, hydra and recurrent need one.
        kind: a name of `FAMILIES`.
        bias: of the residual blocks.
        rank: of the matrices of medusa_lowrank, rooted and recurrent; None is full.
        num_tokens: size of the head vocabulary of these and of medusa_tied, the most frequent
            tokens; None is all.
        own_projections: of recurrent; see `own_projections_for`.
        prefix_attention: put a layer of attention over all hidden states before the heads.
        token_counts: how often each token comes [V], for `num_tokens`.

    Raises:
        ValueError: `kind` is not known, or a number does not fit it.
    """
    if kind not in FAMILIES:
        raise ValueError(f"kind={kind} is not known: use one of {', '.join(FAMILIES)}.")
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    check_shape(kind, num_layers, rank, num_tokens)
    if num_tokens is not None and token_counts is None:
        raise ValueError("num_tokens needs token_counts, to know which tokens are frequent.")
    lm_head, is_quantized = backbone.lm_head, getattr(backbone.model, "is_quantized", False)
    config = MedusaHeadsConfig(
        kind=kind,
        num_heads=num_heads,
        num_layers=num_layers,
        bias=bias,
        rank=None if rank is None else min(rank, backbone.hidden_size),
        num_tokens=None if num_tokens is None else min(num_tokens, backbone.vocab_size),
        own_projections=bool(
            own_projections_for(kind, backbone.vocab_size, num_tokens, own_projections)
        ),
        prefix_attention=prefix_attention,
        num_attention_heads=attention_heads(
            backbone.model.config.get_text_config(), backbone.hidden_size
        ),
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_bias=getattr(lm_head, "bias", None) is not None,
        backbone=str(backbone.model.config.name_or_path),
        backbone_identity=backbone.identity(),
        backbone_weights="" if is_quantized else backbone.weights_fingerprint(),
    )
    heads = MedusaHeads(config).float().to(backbone.device)
    heads.lm_heads.start(backbone, token_counts)
    return heads.attach(backbone)


def check_shape(kind: str, num_layers: int, rank: int | None, num_tokens: int | None) -> None:
    """Raise a ValueError where these hyperparameters do not go together."""
    if num_layers < (fewest := FAMILIES[kind].min_layers):
        raise ValueError(f"kind={kind} needs num_layers of {fewest} or more.")
    if kind == "medusa_lowrank" and rank is None and num_tokens is None:
        raise ValueError("kind=medusa_lowrank needs rank or num_tokens.")
    for name, value, kinds in (("rank", rank, LOW_RANK), ("num_tokens", num_tokens, _FREQUENT)):
        if value is not None and kind not in kinds:
            raise ValueError(f"kind={kind} has no {name}: {', '.join(kinds)} have.")
