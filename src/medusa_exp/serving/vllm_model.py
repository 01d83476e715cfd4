"""Exported heads as a draft model of vLLM: K heads on one hidden state, for its MTP proposers.

For each step k of a draft the engine calls `forward(..., spec_step_idx=k)` for all scheduled
tokens, picks the rows of the tokens that stand last, and calls `compute_logits(rows, k)`. So
`forward` hands the states on, and `compute_logits` is head k. Tensors have the names that our own
files give them; vLLM puts the target's embedding, and where they are tied its lm_head, into place.

This runs in the engine's process: of this project it imports two small modules and no more.

N scheduled tokens, R requests, D hidden, V vocabulary, W head vocabulary, K heads, J tokens.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from medusa_exp.errors import UserError
from medusa_exp.identity import identity_of_files

log = logging.getLogger(__name__)

CONFIG_KEYS = (
    *("num_nextn_predict_layers", "hidden_size", "vocab_size", "num_attention_heads"),
    *("medusa_kind", "medusa_num_layers", "medusa_bias", "medusa_rank", "medusa_num_tokens"),
    *("medusa_lm_head_bias", "medusa_prefix_attention"),
)
"""What config.json must say; `medusa_backbone` and `medusa_backbone_identity` it should."""


_LOW_RANK = ("medusa_lowrank", "rooted", "recurrent")
"""Kinds whose projections are those of `_LowRank`."""


class MedusaExpMTP(nn.Module):
    """All families of heads. `config.json` is that of `export.format=vllm`.

    Raises:
        UserError: the heads do not go with this target or this engine; says what differs.
    """

    # `has_own_embed_tokens` must not exist, in whatever value: V1 takes a model that has it for an
    # EAGLE model, and looks for an embedding that is not there. Without it, it hangs in the
    # target's.

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        speculative = vllm_config.speculative_config
        self.config = config = speculative.draft_model_config.hf_config
        _check(config, speculative)
        self.kind: str = config.medusa_kind
        self.is_grounded, self.is_recurrent = self.kind == "hydra", self.kind == "recurrent"
        self.is_rooted = self.kind == "rooted"
        self.has_own_lm_head = self.kind != "medusa_tied"
        # vLLM hangs the target's embedding into `.model`.
        self.model = _Heads(config, vllm_config, maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(config.medusa_num_tokens or config.vocab_size)
        self._embedded: list[Tensor] = []
        """Embeddings [R, D] of the tokens that hydra's heads up to the present one have seen."""

    def embed_input_ids(
        self,
        input_ids_N: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Return the target's embeddings [N, D].

        Those of images are not filled in: heads see the embeddings of generated tokens alone.
        """
        return self.model.embed_tokens(input_ids_N)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return states [N, D] for `compute_logits`, and for the next step.

        For recurrent heads these are the states after one token more, for rooted ones those after
        the first. Two different ones for hydra, whose heads also need the embedding of the token
        that follows each state: [N, 2 D] and [N, D]. V2 takes a tuple from any model. V1 takes it
        only where `architectures` has one of four names: exported hydra heads name
        DeepSeekMTPModel, behind ours, for no other reason.

        Args:
            input_ids: [N], the token behind each position: the certain one, then drafted ones.
            positions: [N], or [3, N] for targets that see pictures.
            hidden_states: [N, D], the target's at step 0, then what this returned for them.
            intermediate_tensors: of pipelines; not used.
            inputs_embeds: [N, D], embeddings of `input_ids` where the engine has them already.
            spec_step_idx: k.
        """
        if spec_step_idx == 0 and self.config.medusa_prefix_attention:
            hidden_states = self.model.prefix(positions, hidden_states)
        sees_root = self.is_rooted and spec_step_idx == 0
        if not (self.is_grounded or self.is_recurrent or sees_root):
            return hidden_states
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        if self.is_rooted:  # the first token is the root, and stays what all heads see
            return self.model.root_block(hidden_states, inputs_embeds.to(hidden_states))
        if self.is_recurrent:
            first, *others = self.model.blocks[0]
            hidden_states = first(hidden_states, inputs_embeds.to(hidden_states))
            for block in others:
                hidden_states = block(hidden_states)
            return hidden_states
        return torch.cat([hidden_states, inputs_embeds.to(hidden_states)], -1), hidden_states

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        """Return logits [R, V] of head `spec_step_idx`, of the rows that `forward` returned."""
        k, x_RD = spec_step_idx, hidden_states
        blocks = [] if self.is_recurrent else list(self.model.blocks[k])
        if self.is_grounded:
            x_RD, embedded_RD = x_RD.chunk(2, -1)
            # Requests keep their rows for all steps of a draft.
            self._embedded = [*(self._embedded if k else []), embedded_RD]
            x_RD = blocks.pop(0)(x_RD, torch.cat(self._embedded, -1))
        for block in blocks:
            x_RD = block(x_RD)
        if not self.has_own_lm_head:
            return self._project(self.lm_head, x_RD)
        heads = self.model.lm_heads
        if self.kind not in _LOW_RANK:
            return self._project(heads[k], x_RD)
        place = k if len(heads.up) > 1 else 0
        down = heads.down[place] if len(heads.down) else nn.Identity()
        logits_RW = self._project(heads.up[place], down(x_RD))
        if logits_RW is None or not self.config.medusa_num_tokens:
            return logits_RW
        full_RV = logits_RW.new_full((len(logits_RW), self.config.vocab_size), -torch.inf)
        return full_RV.index_copy_(-1, heads.token_map, logits_RW)

    def _project(self, lm_head: nn.Module, x_RD: Tensor) -> Tensor | None:
        """Return logits, gathered from all processes; None in some of them on some platforms."""
        return self.logits_processor(lm_head, x_RD, getattr(lm_head, "bias", None))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors; return their names.

        Raises:
            UserError: there are too few or too many. Without an error, a missing matrix would show
                in nothing but guesses that are all wrong.
        """
        parameters, loaded = dict(self.named_parameters()), set()
        place = self.config.name_or_path or "the draft model's directory"
        for name, tensor in weights:
            parameter = parameters.get(f"model.{name}")
            if parameter is None:
                raise UserError(
                    f"{name} in {place} is no tensor of {self.kind} heads as its config.json has "
                    "them: export them again."
                )
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor)
            loaded.add(f"model.{name}")
        if missing := sorted(parameters.keys() - loaded):
            names = ", ".join(name.removeprefix("model.") for name in missing[:4])
            raise UserError(f"{place} lacks {names}: export the heads again.")
        return loaded


class _Heads(nn.Module):
    """The tensors: of the same names as in `heads/model.safetensors`."""

    embed_tokens: nn.Module

    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.medusa_bias
        is_recurrent = config.medusa_kind == "recurrent"
        heads = range(1 if is_recurrent else config.num_nextn_predict_layers)
        if config.medusa_prefix_attention:
            # vLLM wants one number in a layer's name, and none that a layer of the target has.
            target = vllm_config.speculative_config.target_model_config.hf_text_config
            layer = f"layers.{target.num_hidden_layers}.prefix"
            self.prefix = _PrefixAttention(config, vllm_config, maybe_prefix(prefix, layer))
        if config.medusa_kind == "rooted":
            self.root_block = _RecurrentBlock(size, bias)
        self.blocks = nn.ModuleList()
        for k in heads:
            blocks: list[nn.Module] = [
                _ResBlock(size, bias) for _ in range(config.medusa_num_layers)
            ]
            if config.medusa_kind == "hydra":
                blocks[0] = _GroundedBlock(size, k + 1, bias)
            elif is_recurrent:
                blocks[0] = _RecurrentBlock(size, bias)
            self.blocks.append(nn.Sequential(*blocks))
        if config.medusa_kind in _LOW_RANK:
            self.lm_heads: nn.Module = _LowRank(config, maybe_prefix(prefix, "lm_heads"))
        elif config.medusa_kind != "medusa_tied":
            self.lm_heads = nn.ModuleList(
                ParallelLMHead(
                    config.vocab_size,
                    size,
                    bias=config.medusa_lm_head_bias,
                    prefix=maybe_prefix(prefix, f"lm_heads.{k}"),
                )
                for k in heads
            )


class _ResBlock(nn.Module):
    """As `ResBlock` of model/heads/layers.py; so are the others, of their names there."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + silu(self.linear(x))


class _GroundedBlock(nn.Module):
    def __init__(self, size: int, num_tokens: int, bias: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(num_tokens * size, size, bias=False)
        self.linear = nn.Linear((1 + num_tokens) * size, size, bias=bias)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return x + self.skip(embedded) + silu(self.linear(torch.cat([x, embedded], -1)))


class _RecurrentBlock(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * size, 2 * size, bias=bias)
        self.out = nn.Linear(size, size, bias=False)
        self.skip = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        n, e = (rms_norm(y, y.shape[-1:], eps=1e-6) for y in (x, embedded))
        gate, up = self.inner(torch.cat([n, e], -1)).chunk(2, -1)
        return x + self.out(silu(gate) * up) + self.skip(e)


class _LowRank(nn.Module):
    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        size, rank = config.hidden_size, config.medusa_rank
        num_tokens = config.medusa_num_tokens or config.vocab_size
        # Recurrent heads that were exported before each had its own do not say so: they have one.
        is_one = config.medusa_kind == "recurrent" and not getattr(
            config, "medusa_own_projections", False
        )
        heads = range(1 if is_one else config.num_nextn_predict_layers)
        self.down = nn.ModuleList(nn.Linear(size, rank, bias=False) for _ in heads if rank)
        self.up = nn.ModuleList(
            ParallelLMHead(
                num_tokens,
                rank or size,
                bias=config.medusa_lm_head_bias,
                prefix=f"{prefix}.up.{k}",
            )
            for k in heads
        )
        if config.medusa_num_tokens:
            # A parameter, since vLLM loads no buffers.
            token_map = torch.zeros(num_tokens, dtype=torch.long)
            self.token_map = nn.Parameter(token_map, requires_grad=False)


class _PrefixAttention(nn.Module):
    """One causal attention over all states so far; vLLM keeps its keys and values, in pages."""

    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(size, size, bias=False) for _ in range(4))
        width = size // self.num_heads
        self.attn = Attention(
            self.num_heads,
            width,
            width**-0.5,
            num_kv_heads=self.num_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x_ND: Tensor) -> Tensor:
        if positions.ndim == 2:  # three for each token, which are equal outside of pictures
            positions = positions[0]
        half = x_ND.shape[-1] // self.num_heads // 2
        frequency = 10_000.0 ** -(torch.arange(half, device=x_ND.device) / half)
        angle_N1E = (positions[:, None].float() * frequency).repeat(1, 2)[:, None]
        cos_N1E, sin_N1E = angle_N1E.cos().to(x_ND.dtype), angle_N1E.sin().to(x_ND.dtype)

        def rotate(y_ND: Tensor) -> Tensor:
            y_NHE = y_ND.unflatten(1, (self.num_heads, -1))
            first, second = y_NHE.chunk(2, -1)
            return (y_NHE * cos_N1E + torch.cat([-second, first], -1) * sin_N1E).flatten(1)

        normed_ND = self.norm(x_ND)
        q_ND, k_ND = rotate(self.q(normed_ND)), rotate(self.k(normed_ND))
        return x_ND + self.out(self.attn(q_ND, k_ND, self.v(normed_ND)))


def _check(config: Any, speculative: Any) -> None:
    """Raise a UserError where target, heads and number of draft tokens do not go together."""
    place = config.name_or_path or "the draft model"
    if lacking := [key for key in CONFIG_KEYS if not hasattr(config, key)]:
        raise UserError(f"{place}/config.json lacks {lacking[0]}: export the heads again.")
    asked, has = speculative.num_speculative_tokens, config.num_nextn_predict_layers
    if asked > has:  # vLLM would let multiples through, and draft what no head stands for
        raise UserError(
            f"num_speculative_tokens={asked}: {place} has {has} heads; ask for 1 to {has}."
        )
    target = speculative.target_model_config
    theirs = target.hf_text_config
    for what, wanted, found in (
        ("hidden size", config.hidden_size, theirs.hidden_size),
        ("vocabulary", config.vocab_size, theirs.vocab_size),
    ):
        if wanted != found:
            raise UserError(
                f"the heads in {place} were trained for {_backbone(config)}, whose {what} is "
                f"{wanted}; the target {target.model} has {found}."
            )
    _check_identity(config, target, place)


def _check_identity(config: Any, target: Any, place: str) -> None:
    """Compare the target's final norm and lm_head with those the heads were trained on."""
    wanted: str = getattr(config, "medusa_backbone_identity", None) or ""
    options = {"trust_remote_code": getattr(target, "trust_remote_code", False)}
    if revision := getattr(target, "revision", None):
        options["revision"] = revision
    found = identity_of_files(target.model, **options) if wanted else None
    if found is None:
        log.warning(
            "not known whether %s is the model that the heads in %s were trained for: %s",
            *(target.model, place, _backbone(config)),
        )
    elif found != wanted:
        raise UserError(
            f"the heads in {place} were trained for {_backbone(config)}, identity {wanted[:12]}; "
            f"the target {target.model} is another model, identity {found[:12]}. Serve that model, "
            "or train heads for this one."
        )


def _backbone(config: Any) -> str:
    return getattr(config, "medusa_backbone", None) or "another model"
