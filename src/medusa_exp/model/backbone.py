"""The backbone: the frozen target model, with the hidden states and logits that heads need.

B batch, T time, N tokens of one forward, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from medusa_exp.errors import UserError
from medusa_exp.model.attention import GroupedAttention, kernels_for
from medusa_exp.model.names import Names

_LOGIT_SIZES = (0.1, 1.0, 10.0, 100.0)
"""Largest logits of the states that are tried on an lm_head: a cap shows at the large ones, a scale
at all, and at the small ones a cap does not hide the scale."""
_LENGTHS = (3, 8)
"""Of the texts on which a model is compared with our reading of it."""
_SPECIAL = ("bos_token_id", "pad_token_id", "sep_token_id", "unk_token_id")

_CACHE_ARGUMENTS = ("cache_params", "past_key_values", "cache")
"""Names by which models take their cache: those of nothing but states, those of transformers before
5.24 and models with code of their own, and those of transformers since."""


class Backbone:
    """A model with the two things Medusa needs of it: last hidden states, and logits on a tree.

    The hidden state is what the model hands to its `lm_head`, whatever the architecture: some
    scale what their layers give (MiniCPM). What comes behind the `lm_head` is the model's too:
    Granite, Cohere and their kin scale the logits, Gemma caps them. Wrapping a model changes
    nothing about it: `forward`, on a cache, uses `grouped_attention` in place of sdpa while it
    runs, unless `uses_grouped_attention` is False.

    Raises:
        UserError: it is no decoder-only language model.
    """

    def __init__(self, model: PreTrainedModel, *, uses_grouped_attention: bool = True) -> None:
        self.model, self.uses_grouped_attention = model, uses_grouped_attention
        self.lm_head: nn.Module = model.get_output_embeddings()
        if self.lm_head is None or model.config.is_encoder_decoder:
            raise UserError(f"{self.name} is no decoder-only language model with an lm_head.")
        self.body: nn.Module = model.get_decoder()
        if self.body is model:  # Llama 4 takes its text model for the decoder
            self.body = model.model
        self._grouped = GroupedAttention(model) if uses_grouped_attention else None
        self.has_body = True
        self.names = Names(model)
        named = _cache_argument(model) or _cache_argument(self.body)
        self._cache_argument = named or "past_key_values"

    @property
    def name(self) -> str:
        """What errors call it."""
        name = self.model.config.name_or_path  # empty where it came from a config alone
        kind = type(self.model).__name__
        return f"model.path={name} ({kind})" if name else kind

    @property
    def device(self) -> torch.device:
        """Where the model lies; where it is spread, the embedding, and all that comes out."""
        return self.model.device

    @property
    def is_spread(self) -> bool:
        """Do its layers lie on several devices (`model.device_map`)?"""
        return len(set(getattr(self.model, "hf_device_map", {}).values())) > 1

    @property
    def is_adapted(self) -> bool:
        """Has it learnt together with heads, in Medusa-2? Then only those go with it."""
        return hasattr(self.model.config, "medusa_adapter")

    @property
    def hidden_size(self) -> int:
        """D, the width of what `lm_head` reads."""
        return self.lm_head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """V, the rows of `lm_head`: often more than the tokenizer's entries."""
        return self.lm_head.weight.shape[0]

    @property
    def num_ids(self) -> int:
        """Rows of the embedding: token ids that a prompt may have. Some models say fewer."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Positions the model was made for; of those that a dynamic rotary stretches, the first.

        Beyond these every further token turns all keys anew, those in the cache excepted.
        """
        config = self.model.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None) or 2**20]
        limits += [self._original_length(rope) for rope in self._rotaries("dynamic")]
        return min(limits)

    @property
    def rotary_boundary(self) -> int | None:
        """Length beyond which a sequence has another rotary (LongRoPE); None where none has.

        Which of the two a forward takes depends on its longest row: no rows of both sides may
        share it.
        """
        return min(
            (self._original_length(rope) for rope in self._rotaries("longrope")), default=None
        )

    def max_length_from(self, prompt_length: int) -> int:
        """Positions that a prompt of so many tokens may be continued to, in one cache.

        LongRoPE turns all keys differently once a sequence passes the length of pre-training: what
        is in the cache does not suit what follows. A prompt beyond that length is not concerned.
        """
        boundary = self.rotary_boundary
        if boundary is not None and prompt_length <= boundary:
            return min(self.max_length, boundary)
        return self.max_length

    def _rotaries(self, kind: str) -> list[dict[str, Any]]:
        """Return the rotary parameters of this kind, of the model or of a kind of its layers."""
        found = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        by_layer = [rope for rope in found.values() if isinstance(rope, dict)]
        return [rope for rope in [found, *by_layer] if rope.get("rope_type") == kind]

    def _original_length(self, rope: dict[str, Any]) -> int:
        config, key = self.model.config.get_text_config(), "original_max_position_embeddings"
        whole = getattr(config, "max_position_embeddings", None) or 2**20
        return int(getattr(config, key, None) or rope.get(key) or whole)

    @property
    def eos_token_ids(self) -> set[int]:
        """Ids that end a response, of the generation config and else of the model's."""
        config = self.model.generation_config or self.model.config
        ids = config.eos_token_id if config.eos_token_id is not None else []
        return set(ids if isinstance(ids, list) else [ids])

    def hidden_states(self, input_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Return hidden_BTD of rows padded on the right, if at all.

        Where `positions_BT` starts again from 0, a document of its own begins, which sees nothing
        of what stands before it in the row: transformers makes the mask from the positions.
        """
        assert self.has_body, "only the ends of this model were loaded"
        with (
            kernels_for(self.device),
            _told_what_is_packed(positions_BT is not None),
            self._without_mixed_halves(),
        ):
            output = self.body(input_ids=input_ids_BT, position_ids=positions_BT, use_cache=False)
        return self.as_read(output.last_hidden_state.to(self.device))

    def _without_mixed_halves(self) -> AbstractContextManager[Any]:
        """Turn off an autocast to bfloat16 of a float16 model, or the other way round.

        On a CPU a LayerNorm takes no input of the one type with weights of the other.
        """
        other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
        if self.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return nullcontext()
        if torch.get_autocast_dtype("cpu") != other.get(self.model.dtype):
            return nullcontext()
        return torch.autocast("cpu", enabled=False)

    def as_read(self, body_BTD: Tensor) -> Tensor:
        """Return what `lm_head` is given of what the layers and the final norm make."""
        return body_BTD if self.hidden_scale == 1 else body_BTD * self.hidden_scale

    @cached_property
    def hidden_scale(self) -> float:
        """What the model multiplies its last hidden state by before its `lm_head`; mostly 1."""
        with torch.inference_mode():
            body_ND, read_ND = self._around_scale(_LENGTHS[0])
        return _factor(body_ND, read_ND)

    def layers(self) -> nn.ModuleList | None:
        """Return the list of its `num_layers` layers; some architectures have none."""
        lists = (m for m in self.body.modules() if isinstance(m, nn.ModuleList))
        return next((found for found in lists if len(found) == self.num_layers), None)

    @contextmanager
    def compiled(self, backend: Any = "inductor") -> Iterator[None]:
        """Have torch compile each layer at its first call, for as long as this lasts.

        Layers are alike: what is compiled for one serves all, for rows of all lengths.

        Raises:
            UserError: the model has no list of its layers.
        """
        layers = self.layers()
        if layers is None:
            raise UserError(f"{self.name} has no list of its {self.num_layers} layers.")
        for layer in layers:
            layer.compile(dynamic=True, backend=backend)
        try:
            # torch's cache on disk does not ask by which kernel of attention a layer was compiled.
            with torch.compiler.config.patch(cache_key_tag="medusa_exp: few shapes"):
                yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None  # private: torch 2.13

    def next_logits(self, hidden_RD: Tensor) -> Tensor:
        """Return the model's logits_RV for hidden states, in its dtype: scaled and capped as its.

        Where anything comes behind the `lm_head`, the model's own code does all of it.
        """
        hidden_RD, device = hidden_RD.to(self.lm_head.weight.dtype), hidden_RD.device
        make = self.lm_head if self._is_bare else self._logits_by_model
        return make(hidden_RD).to(device)

    @cached_property
    def logit_scale(self) -> float:
        """How many times its `lm_head`'s are the model's logits, where they are small; mostly 1.

        Heads that start as a copy of the `lm_head`, or share it, are to be as sharp as the model.
        """
        bare_RV, own_RV = self._logits_of_states
        return 1.0 if self._is_bare else _factor(bare_RV[0], own_RV[0])

    @cached_property
    def _is_bare(self) -> bool:
        """Are the model's logits those of its `lm_head` alone?"""
        bare_RV, own_RV = self._logits_of_states
        tolerance = max(1e-4, 2 * torch.finfo(self.lm_head.weight.dtype).eps)
        return _is_close(bare_RV, own_RV, tolerance)

    @cached_property
    @torch.inference_mode()
    def _logits_of_states(self) -> tuple[Tensor, Tensor]:
        """Return logits_RV of made-up hidden states, by the `lm_head` and by the model's code.

        Twice the same where that code does not run without the layers: whether the `lm_head` is all
        there is, `check_next_logits` sees in the model as a whole.
        """
        weight = self.lm_head.weight
        draws = torch.Generator().manual_seed(0)
        states_RD = torch.randn(len(_LOGIT_SIZES), self.hidden_size, generator=draws)
        states_RD = states_RD.to(weight.device, weight.dtype)
        largest_R1 = self.lm_head(states_RD).float().abs().amax(-1, keepdim=True)
        sizes_R1 = torch.tensor(_LOGIT_SIZES, device=weight.device)[:, None]
        states_RD = (states_RD * (sizes_R1 / largest_R1.clamp(min=1e-6))).to(weight.dtype)
        bare_RV = self.lm_head(states_RD)
        try:
            own_RV = self._logits_by_model(states_RD)
        except Exception:  # of code that wants more of its layers than hidden states
            return bare_RV, bare_RV
        return bare_RV, own_RV if own_RV.shape == bare_RV.shape else bare_RV

    def _logits_by_model(self, hidden_RD: Tensor) -> Tensor:
        """Let the model's own code go on from hidden states: its layers are left out."""
        output = _OnlyHiddenStates(last_hidden_state=hidden_RD[None] / self.hidden_scale)
        ids_1R = torch.zeros(1, len(hidden_RD), dtype=torch.long, device=self.device)
        with _answering(self.body, output):
            return self.model(input_ids=ids_1R, use_cache=False).logits[0]

    def forward(
        self,
        input_ids_BN: Tensor,
        cache: Cache,
        *,
        mask: Any = None,
        position_ids_BN: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run N more tokens on a cache; return (logits_BNV, hidden_BND).

        Args:
            input_ids_BN: the tokens.
            cache: keys and values of what came before; the tokens' own are added.
            mask: [B, 1, N, past + N], True where to look (or a dict of them by kind of layer);
                None is plain causal.
            position_ids_BN: None counts on from the cache.
            keep: numbers of the tokens whose logits and hidden states are wanted; None is all.
        """
        grouped = self._grouped.used() if self._grouped is not None else nullcontext()
        with grouped, kernels_for(self.device):
            return self._with_lm_head_input(
                input_ids=input_ids_BN,
                **{self._cache_argument: cache},
                attention_mask=mask,
                position_ids=position_ids_BN,
                use_cache=True,
                logits_to_keep=0 if keep is None else keep,
            )

    def identity(self) -> str:
        """Return what heads are trained for: `Names.identity`."""
        return self.names.identity()

    def weights_fingerprint(self) -> str:
        """Return what the model's responses depend on: `Names.fingerprint`."""
        return self.names.fingerprint()

    def leave_out_body(self, identity: str, weights_fingerprint: str) -> None:
        """Say that this model has no layers, and which whole model its ends are of."""
        self.has_body = False
        self.names.give(identity, weights_fingerprint)

    def _with_lm_head_input(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Call the model; return its logits and what its lm_head read to make them."""
        kept: list[Tensor] = []
        handle = self.lm_head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            logits = self.model(**arguments).logits
        finally:
            handle.remove()
        return logits.to(self.device), kept[0].to(self.device)

    @torch.inference_mode()
    def check_hidden_states(self) -> None:
        """Compare `hidden_states`, which heads are trained on, with what `lm_head` reads.

        Raises:
            UserError: this architecture changes the last hidden state once more before its lm_head,
                or does not run on tokens alone.
        """
        for length in _LENGTHS:
            try:
                body_ND, read_ND = self._around_scale(length)
            except Exception as error:  # of code that wants pictures, or another kind of body
                raise UserError(
                    f"{self.name} gives no hidden states for tokens alone, as a causal language "
                    f"model does ({type(error).__name__}: {str(error)[:200]})."
                ) from error
            if not _is_close(self.as_read(body_ND), read_ND, self._tolerance):
                raise UserError(
                    f"{self.name}: what its lm_head reads is not its last hidden state; "
                    "heads cannot be trained on this architecture."
                )

    @torch.inference_mode()
    def check_next_logits(self) -> None:
        """Compare the model's log-probabilities with those of `next_logits` at its hidden states.

        Raises:
            UserError: what this architecture does to its logits cannot be told from them alone.
        """
        for length in _LENGTHS:
            logits_1NV, read_1ND = self._with_lm_head_input(
                input_ids=self._distinct_tokens(length), use_cache=False
            )
            expected_NV, found_NV = logits_1NV[0].float(), self.next_logits(read_1ND[0]).float()
            # As sharp as the logits are large: the errors of both stand beside each other so.
            size = float(expected_NV.abs().amax())
            is_same = expected_NV.shape == found_NV.shape and _is_close(
                expected_NV.log_softmax(-1), found_NV.log_softmax(-1), self._tolerance, size
            )
            if not is_same:
                raise UserError(
                    f"{self.name} makes something of the logits of its lm_head that its hidden "
                    "states do not tell: heads cannot be trained on its distribution. Set "
                    "train.loss=ce and train.labels=data."
                )

    @torch.inference_mode()
    def check_packing(self) -> None:
        """Compare documents' hidden states alone and behind another one.

        Raises:
            UserError: this architecture lets packed documents see each other.
        """
        tokens_1T = self._distinct_tokens(sum(_LENGTHS))
        documents = tokens_1T.split(_LENGTHS, dim=1)
        positions = [torch.arange(length, device=self.device)[None] for length in _LENGTHS]
        packed_BTD = self.hidden_states(tokens_1T, torch.cat(positions, 1))
        for document_1T, packed_1ND in zip(documents, packed_BTD.split(_LENGTHS, 1), strict=True):
            if not _is_close(packed_1ND, self.hidden_states(document_1T), 4 * self._tolerance):
                raise UserError(
                    f"{self.name} lets documents of a packed row see each other: set "
                    "train.batching=padded."
                )

    @property
    def _tolerance(self) -> float:
        """How far, in parts of the largest value, two ways to the same values may differ."""
        return max(1e-4, 8 * torch.finfo(self.model.dtype).eps)

    def _distinct_tokens(self, length: int) -> Tensor:
        """Return ids_1N from all over the vocabulary, none special: rows of zeros hide much."""
        config = self.model.config.get_text_config()
        special = {getattr(config, name, None) for name in _SPECIAL}
        special |= self.eos_token_ids
        ordinary = [token for token in range(self.vocab_size) if token not in special]
        tokens = Random(length).sample(ordinary, min(length, len(ordinary)))
        return torch.tensor([(tokens * length)[:length]], device=self.device)

    def _around_scale(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the body's own last hidden states of a text, and what `lm_head` reads of them."""
        ids_1N = self._distinct_tokens(length)
        body_1ND = self.body(input_ids=ids_1N, use_cache=False).last_hidden_state
        _, read_1ND = self._with_lm_head_input(input_ids=ids_1N, use_cache=False)
        return body_1ND[0].to(self.device), read_1ND[0]


class _OnlyHiddenStates(BaseModelOutputWithPast):
    """What a model's layers would have returned, of which only the hidden states are there."""

    def __getattr__(self, name: str) -> None:
        """Be without whatever else this architecture's layers return."""
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return this instead of running."""
    before = module.__dict__.get("forward")  # accelerate puts one there
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _factor(before: Tensor, after: Tensor) -> float:
    """Return c where after = c * before, by least squares; 1 if near it.

    To four digits, so that it is the same in every dtype.
    """
    before, after = before.cpu().double(), after.cpu().double()  # Apple's GPUs have no float64
    square = float((before * before).sum())
    factor = float((before * after).sum()) / square if square else 1.0
    return 1.0 if abs(factor - 1) < 2e-3 else float(f"{factor:.4g}")


def _is_close(one: Tensor, other: Tensor, tolerance: float, size: float = 0.0) -> bool:
    """Say whether values differ by no more than that part of the largest; NaN is never close."""
    one, other = one.float(), other.float()
    largest = max(size, float(one.abs().amax()))
    return bool((one - other).abs().amax() <= tolerance * largest + 1e-6)


_find_packed = masking_utils.find_packed_sequence_indices  # private: transformers 5.23
_is_packed: ContextVar[bool | None] = ContextVar("is_packed", default=None)
"""Do rows of the forward call that is running hold several documents? None: it is another's."""


def _documents_of(position_ids: Tensor) -> Tensor | None:
    """Say which document each position is of; transformers itself would wait for the GPU."""
    if (is_packed := _is_packed.get()) is None:
        found: Tensor | None = _find_packed(position_ids)
        return found
    is_first = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    return is_first.cumsum(-1) if is_packed else None


masking_utils.find_packed_sequence_indices = _documents_of


@contextmanager
def _told_what_is_packed(is_packed: bool) -> Iterator[None]:
    """Say of the forwards within whether their rows are packed with several documents."""
    token = _is_packed.set(is_packed)
    try:
        yield
    finally:
        _is_packed.reset(token)


def _cache_argument(module: nn.Module) -> str | None:
    """Return the name by which it takes a cache; None where it takes anything, as PEFT's models."""
    taken = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in taken), None)
