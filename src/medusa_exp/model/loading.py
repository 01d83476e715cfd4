"""Config in; backbone and device out, each checked before anything long begins."""

import logging

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.source import LOADING_ERRORS, first_lines, hub_options, model_path
from medusa_exp.model.tokenizer import load_tokenizer, num_ids

log = logging.getLogger(__name__)


def load_backbone(config: Config) -> Backbone:
    """Load the backbone that the config names onto its device, frozen.

    With tokenizer.resize_embedding it gets a row for each token that is new to it.

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
            **hub_options(config),
        )
    except (*LOADING_ERRORS, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={path} cannot be loaded: {first_lines(error)}") from error
    if report["missing_keys"]:  # transformers would go on with random values for them
        names = ", ".join(sorted(report["missing_keys"])[:4])
        raise UserError(f"model.path={path}: its files lack {names}, which its config asks for.")
    if config.tokenizer.resize_embedding:
        grow_embedding(model, num_ids(load_tokenizer(config)))
    model = model.to(pick_device(config.device)).eval().requires_grad_(False)
    backbone = Backbone(model)
    backbone.check_hidden_states()
    backbone.decodes_statically = backbone.device.type == "cuda" and config.decode.cuda_graph
    return backbone


def grow_embedding(model: PreTrainedModel, size: int) -> None:
    """Give a model rows for the token ids below `size`, each the mean of its old rows.

    The mean and not a draw, as transformers has it: heads know their backbone by its lm_head.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in module.parameters():  # the weight, and the bias of some lm_heads
                rows[old:] = _mean_row(rows[:old])
    log.info(
        "tokenizer.resize_embedding: the model's vocabulary grows from %d to %d rows", old, size
    )


def _mean_row(rows: Tensor) -> Tensor:
    # Of values rounded to bfloat16, and rounded to it, since Backbone.identity() reads them so: it
    # must not depend on the dtype that the model is loaded in. In pieces, since float64 is large.
    total = sum(piece.bfloat16().double().sum(0) for piece in rows.split(4096))
    return (total / len(rows)).bfloat16()


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
