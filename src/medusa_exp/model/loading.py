"""Config in; backbone, tokenizer and device out, each checked before anything long begins."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from medusa_exp.config import Config
from medusa_exp.data.rendering import check_chat_template
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone

_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
"""What transformers raises for directories that are not what they should be."""


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
    """Load the backbone that the config names onto its device, frozen.

    Raises:
        UserError: the model cannot be loaded; says which, and what transformers said.
    """
    path = model_path(config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=config.dtype.backbone,
            attn_implementation=config.model.attn_implementation,
            use_safetensors=True,
            **_hub_options(config),
        )
    except (*_LOADING_ERRORS, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={path} cannot be loaded: {_first_lines(error)}") from error
    if report["missing_keys"]:  # transformers would go on with random values for them
        names = ", ".join(sorted(report["missing_keys"])[:4])
        raise UserError(f"model.path={path}: its files lack {names}, which its config asks for.")
    model = model.to(pick_device(config.device)).eval().requires_grad_(False)
    backbone = Backbone(model)
    backbone.check_hidden_states()
    return backbone


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer and check that it can render chats and fits the backbone.

    Raises:
        UserError: it cannot be loaded, has no chat template, or has more entries than the model.
    """
    model = model_path(config)
    path = config.tokenizer.path or model
    options = _hub_options(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **(options if path == model else {}))
        vocab_size = AutoConfig.from_pretrained(model, **options).get_text_config().vocab_size
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


def _hub_options(config: Config) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    if config.model.revision:
        options["revision"] = config.model.revision
    return options


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
