"""A causal language model of transformers, frozen, as the rest of the project sees it.

B batch, T time, N tokens of one forward, D hidden, V vocabulary.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from medusa_exp.config import Config
from medusa_exp.data.rendering import check_chat_template
from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
"""What transformers raises for directories that are not what they should be."""


class Backbone:
    """A frozen model with the two things Medusa needs: last hidden states, and logits on a tree.

    The hidden state is what the model hands to its `lm_head`, whatever the architecture.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.lm_head: nn.Module = model.get_output_embeddings()
        if self.lm_head is None or model.config.is_encoder_decoder:
            raise UserError(f"{_name(model)} is no decoder-only language model with an lm_head.")
        self.body: nn.Module = model.get_decoder()
        self._check_body()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """D, the width of what `lm_head` reads."""
        return self.lm_head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """V, the rows of `lm_head`: often more than the tokenizer's entries."""
        return self.lm_head.weight.shape[0]

    @property
    def max_length(self) -> int:
        """Positions the model was made for."""
        return (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        )

    @property
    def eos_token_ids(self) -> set[int]:
        """Ids that end an answer, of the generation config and else of the model's."""
        config = self.model.generation_config or self.model.config
        ids = config.eos_token_id if config.eos_token_id is not None else []
        return set(ids if isinstance(ids, list) else [ids])

    def hidden_states(self, input_ids_BT: Tensor) -> Tensor:
        """Return hidden_BTD of sequences padded on the right, if at all."""
        return self.body(input_ids=input_ids_BT, use_cache=False).last_hidden_state

    def forward(
        self,
        input_ids_BN: Tensor,
        cache: Cache,
        *,
        mask: Any = None,
        position_ids_BN: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run N more tokens on a cache; return (logits_BNV, hidden_BND).

        Args:
            input_ids_BN: the tokens.
            cache: keys and values of what came before; the tokens' own are added.
            mask: [B, 1, N, past + N], True where to look (or a dict of them by kind of layer);
                None is plain causal.
            position_ids_BN: None counts on from the cache.
            last_only: logits and hidden state of the last token alone (N = 1 in the result).
        """
        return self._with_lm_head_input(
            input_ids=input_ids_BN,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=position_ids_BN,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )

    def identity(self) -> str:
        """Return a sha256 over dimensions, final norm and lm_head: what heads are trained for.

        Weights count as bfloat16, so that a model has one identity in whatever dtype it is loaded.
        """
        config = self.model.config.get_text_config()
        shape = [config.model_type, self.hidden_size, self.vocab_size, config.num_hidden_layers]
        digest = hashlib.sha256(json.dumps(shape).encode())
        # Parameters outside the layers and the embeddings: the final norm (and projections).
        final = [p for name, p in self.body.named_children() if _is_final(p)]
        for module in [*final, self.lm_head]:
            for name, parameter in sorted(module.named_parameters()):
                digest.update(name.encode())
                values = parameter.detach().to(torch.bfloat16).contiguous().view(torch.uint8)
                digest.update(values.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _with_lm_head_input(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Call the model; return its logits and what its lm_head read to make them."""
        kept: list[Tensor] = []
        handle = self.lm_head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            logits = self.model(**arguments).logits
        finally:
            handle.remove()
        return logits, kept[0]

    @torch.inference_mode()
    def _check_body(self) -> None:
        """Refuse models that change the last hidden state once more before their lm_head."""
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        _, read_BTD = self._with_lm_head_input(input_ids=ids_BT, use_cache=False)
        if not torch.allclose(read_BTD, self.hidden_states(ids_BT), rtol=1e-2, atol=1e-3):
            raise UserError(
                f"{_name(self.model)}: what its lm_head reads is not its last hidden state; "
                "heads cannot be trained on this architecture."
            )


def _is_final(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.Embedding)


def _name(model: PreTrainedModel) -> str:
    return f"model.path={model.config.name_or_path} ({type(model).__name__})"


def model_path(config: Config) -> str:
    """Return the directory or hub name of the backbone, checked as far as a look can.

    Raises:
        UserError: it is not set, or is a directory that holds no model.
    """
    from medusa_exp.model.tiny import tiny_dir

    if config.model.kind == "tiny":
        path = tiny_dir(config)
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} does not exist yet: model=tiny is made by stage pretrain. "
                "Put pretrain first in stages."
            )
        return str(path)
    if config.model.path is None:
        raise UserError("model.path is not set: name a Hugging Face model directory or hub name.")
    path = Path(config.model.path).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model.path={path} is no model directory: it has no config.json.")
    if path.is_file():
        raise UserError(f"model.path={path} is a file; name the model's directory.")
    if not path.exists() and (path.is_absolute() or config.model.path.count("/") != 1):
        raise UserError(f"model.path={path}: there is no such directory.")
    return str(path) if path.exists() else config.model.path


def load_backbone(config: Config) -> Backbone:
    """Load the backbone that the config names onto its device.

    Raises:
        UserError: the model cannot be loaded; says which, and what transformers said.
    """
    path = model_path(config)
    options = {"revision": config.model.revision} if config.model.revision else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=config.dtype.backbone,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except (*_LOADING_ERRORS, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={path} cannot be loaded: {_first_lines(error)}") from error
    if report["missing_keys"]:  # transformers would go on with random values for them
        names = ", ".join(sorted(report["missing_keys"])[:4])
        raise UserError(f"model.path={path}: its files lack {names}, which its config asks for.")
    return Backbone(model.to(pick_device(config.device)))


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer and check that it can render chats and fits the backbone.

    Raises:
        UserError: it cannot be loaded, has no chat template, or has more entries than the model.
    """
    model = model_path(config)
    path = config.tokenizer.path or model
    trust = config.model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        vocab_size = (
            AutoConfig.from_pretrained(model, trust_remote_code=trust).get_text_config().vocab_size
        )
    except _LOADING_ERRORS as error:
        raise UserError(
            f"the tokenizer in {path} cannot be loaded: {_first_lines(error)}"
        ) from error
    check_chat_template(tokenizer, path)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {len(tokenizer)} entries, the model in {model} only "
            f"{vocab_size}: they do not belong together. Set tokenizer.path to the model's own."
        )
    return tokenizer


def pick_device(device: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here. Use device=auto or cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
