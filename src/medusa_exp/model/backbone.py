"""The backbone: the frozen target model, with the hidden states and logits that heads need.

`fingerprint_of` and `weights_fingerprint_of` name the model, in whatever dtype it is loaded.

B batch, T time, N tokens of one forward, D hidden, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from medusa_exp.errors import UserError
from medusa_exp.identity import bfloat16_bytes, identity_of

_SAMPLE = 4096
"""Values of a parameter that `Backbone.weights_fingerprint` reads, about."""


class Backbone:
    """A model with the two things Medusa needs of it: last hidden states, and logits on a tree.

    The hidden state is what the model hands to its `lm_head`, whatever the architecture. Wrapping a
    model changes nothing about it.

    Raises:
        UserError: it is no decoder-only language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.lm_head: nn.Module = model.get_output_embeddings()
        if self.lm_head is None or model.config.is_encoder_decoder:
            raise UserError(f"{self.name} is no decoder-only language model with an lm_head.")
        self.body: nn.Module = model.get_decoder()
        self._run_body: Callable[..., Any] = self.body
        self.has_body = True
        self._fingerprints: tuple[str, str] | None = None

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
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Positions the model was made for."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 2**20

    def max_length_from(self, prompt_length: int) -> int:
        """Positions that a prompt of so many tokens may be continued to, in one cache.

        LongRoPE turns all keys differently once a sequence passes the length of pre-training: what
        is in the cache does not suit what follows. A prompt beyond that length is not concerned.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        is_long = isinstance(rope, dict) and rope.get("rope_type") == "longrope"
        key = "original_max_position_embeddings"
        trained = getattr(config, key, None) or rope.get(key)
        if is_long and trained and prompt_length <= trained:
            return min(self.max_length, int(trained))
        return self.max_length

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
        output = self._run_body(input_ids=input_ids_BT, position_ids=positions_BT, use_cache=False)
        return output.last_hidden_state.to(self.device)

    def compile(self, backend: str = "inductor") -> None:
        """Let torch compile what makes `hidden_states`, at its first call, for all lengths."""
        self._run_body = torch.compile(self.body, dynamic=True, backend=backend)

    def next_logits(self, hidden_RD: Tensor) -> Tensor:
        """Return what `lm_head` makes of hidden states: logits_RV, in its dtype."""
        return self.lm_head(hidden_RD.to(self.lm_head.weight.dtype)).to(hidden_RD.device)

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
        return self._with_lm_head_input(
            input_ids=input_ids_BN,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=position_ids_BN,
            use_cache=True,
            logits_to_keep=0 if keep is None else keep,
        )

    def identity(self) -> str:
        """Return a sha256 over dimensions, final norm and lm_head: what heads are trained for.

        Weights count as bfloat16, so that a model has one identity in whatever dtype it is loaded.
        """
        if self._fingerprints is not None:
            return self._fingerprints[0]
        return identity_of(self.model)

    def weights_fingerprint(self) -> str:
        """Return a sha256 over a sample of every parameter: what the model's responses depend on.

        A sample, since reading all of a large model takes minutes, and training or merging leaves
        no tensor's values as they were. In bfloat16, as `identity`.
        """
        if self._fingerprints is not None:
            return self._fingerprints[1]
        digest = hashlib.sha256(self.identity().encode())
        for name, parameter in sorted(self.model.named_parameters()):
            flat = parameter.detach().flatten()
            sample = bfloat16_bytes(flat[:: max(1, len(flat) // _SAMPLE)])
            digest.update(f"{name} {list(parameter.shape)}".encode() + sample)
        return digest.hexdigest()

    def remember_fingerprints(self) -> None:
        """Note which model this is, before its weights are taken apart."""
        self._fingerprints = (self.identity(), self.weights_fingerprint())

    def leave_out_body(self, identity: str, weights_fingerprint: str) -> None:
        """Say that this model has no layers, and which whole model its ends are of."""
        self.has_body = False
        self._fingerprints = (identity, weights_fingerprint)

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
            UserError: this architecture changes the last hidden state once more before its lm_head.
        """
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        _, read_BTD = self._with_lm_head_input(input_ids=ids_BT, use_cache=False)
        if not torch.allclose(read_BTD, self.hidden_states(ids_BT), rtol=1e-2, atol=1e-3):
            raise UserError(
                f"{self.name}: what its lm_head reads is not its last hidden state; "
                "heads cannot be trained on this architecture."
            )

    @torch.inference_mode()
    def check_next_logits(self) -> None:
        """Compare the model's distribution with what its `lm_head` alone makes of hidden states.

        Raises:
            UserError: this architecture scales or caps logits afterwards.
        """
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        logits_BTV, read_BTD = self._with_lm_head_input(input_ids=ids_BT, use_cache=False)
        bare_BTV = self.next_logits(read_BTD).float().softmax(-1)
        if not torch.allclose(logits_BTV.float().softmax(-1), bare_BTV, rtol=1e-2, atol=1e-3):
            raise UserError(
                f"{self.name} changes the logits of its lm_head once more: heads cannot be "
                "trained on its distribution. Set train.loss=ce."
            )

    @torch.inference_mode()
    def check_packing(self) -> None:
        """Compare a document's hidden states alone and behind another one.

        Raises:
            UserError: this architecture lets packed documents see each other.
        """
        ids_BT = torch.arange(1, 5, device=self.device)[None]
        packed_BT, positions_BT = ids_BT.repeat(1, 2), torch.arange(4, device=self.device).repeat(2)
        packed_BTD = self.hidden_states(packed_BT, positions_BT[None])
        alone_BTD = self.hidden_states(ids_BT)
        if not torch.allclose(packed_BTD[:, 4:], alone_BTD, rtol=1e-2, atol=1e-3):
            raise UserError(
                f"{self.name} lets documents of a packed row see each other: set "
                "train.batching=padded."
            )
