"""Load the backbone: weights, dtype, quantization, device; each checked before it takes long."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.filesize import decimal
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from medusa_exp.errors import UserError
from medusa_exp.identity import identity_of, loading_without_layers
from medusa_exp.model.adapters import load_adapters
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.source import LOADING_ERRORS, ModelSpec, first_lines, from_gguf, is_adapters
from medusa_exp.model.tokenizer import load_tokenizer, num_ids
from medusa_exp.runs.machine import has_arithmetic, pick_device
from medusa_exp.runs.seals import check

log = logging.getLogger(__name__)

_NO_SAFETENSORS = re.compile(
    r"no file named model\.safetensors|does not appear to have .*safetensors"
)
"""In what transformers says of a directory, or of a name on the hub."""
_NO_SDPA = "through torch.nn.functional.scaled_dot_product_attention"
"""In what transformers says of a model without sdpa."""


def load_backbone(spec: ModelSpec, adapted: Path | None = None) -> Backbone:
    """Load the backbone onto its device, frozen.

    With tokenizer.resize_embedding it gets a row for each token that is new to it.

    `adapted` is what training has made of the model (train=medusa2): adapters, or a whole model.

    Raises:
        UserError: the model cannot be loaded; says which, and what transformers said.
    """
    if adapted is not None:
        check(adapted, "Restore it, or train again in another run_dir.")
    names = _names(spec) if adapted is None else None  # what was adapted is named as it is saved
    if adapted is None:
        model = _read(spec)
    elif is_adapters(adapted):
        model = load_adapters(_read(spec), adapted).requires_grad_(False)
    else:
        model = _read(spec, path=str(adapted))
    is_free = spec.model.attn_implementation == "auto"
    backbone = Backbone(model, uses_grouped_attention=is_free)
    if names is not None:
        backbone.names.rename(*names)
    backbone.check_hidden_states()
    return backbone


def _names(spec: ModelSpec) -> tuple[str, str] | None:
    """Return identity and fingerprint of a model that is to be rounded to float16; else None.

    Both are of weights in bfloat16, and a weight that has gone through float16 may be another one
    there. So the model is read once more, in bfloat16, on the CPU where it is not spread.
    """
    if spec.dtype != "float16" or spec.model_config().dtype == torch.float16:
        return None
    named = replace(spec, dtype="bfloat16")
    if not _placement(spec):
        named = replace(named, device="cpu")
    backbone = Backbone(_read(named))
    return backbone.identity(), backbone.weights_fingerprint()


def identity_from(spec: ModelSpec, ends: Backbone, num_layers: int) -> str:
    """Return the identity of a model of which nothing but its ends is loaded."""
    if spec.dtype == "float16":  # see `_names`
        ends = load_ends(replace(spec, dtype="bfloat16"), "", "")
    return identity_of(ends.model, num_layers)


def load_ends(spec: ModelSpec, identity: str, weights_fingerprint: str) -> Backbone:
    """Load what stands at a backbone's two ends (embedding, final norm, lm_head), and no layer.

    Enough to train heads where the backbone's hidden states are at hand. `identity` and
    `weights_fingerprint` are what `Backbone` has under these names for the whole model.

    Raises:
        UserError: as `load_backbone`.
    """
    spec = replace(spec, model=replace(spec.model, device_map=None))  # they are small
    model_config = spec.model_config()
    with loading_without_layers(model_config):
        backbone = Backbone(_read(spec, {"config": model_config}))
    backbone.leave_out_body(identity, weights_fingerprint)
    return backbone


def _read(
    spec: ModelSpec, more: Mapping[str, Any] = MappingProxyType({}), path: str | None = None
) -> PreTrainedModel:
    path = path or spec.model_path()
    options = {**_placement(spec), **_quantized(spec), **spec.hub_options(), **more}
    try:
        model, report = _from_pretrained(path, spec, options)
    except (*LOADING_ERRORS, RuntimeError, SafetensorError) as error:
        if _NO_SAFETENSORS.search(first_lines(error)):
            raise UserError(_conversion(path, spec)) from error
        if _NO_SDPA in str(error):
            raise UserError(
                f"model.attn_implementation={spec.model.attn_implementation}: the model in {path} "
                "has no such attention. Set model.attn_implementation=auto, or eager."
            ) from error
        raise UserError(f"model.path={path} cannot be loaded: {first_lines(error)}") from error
    if report["missing_keys"]:  # transformers would go on with random values for them
        names = ", ".join(sorted(report["missing_keys"])[:4])
        raise UserError(f"model.path={path}: its files lack {names}, which its config asks for.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"model.device_map={spec.model.device_map}: the GPUs have no room for all of {path}, "
            "and nothing is offloaded. Set model.quantization=8bit or 4bit, or use more GPUs."
        )
    if spec.tokenizer.resize_embedding:
        grow_embedding(model, num_ids(load_tokenizer(spec)))
    if not _placement(spec):
        model = model.to(pick_device(spec.device))
    return model.eval().requires_grad_(False)


def _conversion(path: str, spec: ModelSpec) -> str:
    """Say what to do with a checkpoint that may have been saved before there were safetensors."""
    if any(Path(path).glob("*.gguf")) and not any(Path(path).glob("*.bin")):
        return f"model.path={path} cannot be loaded: {from_gguf(Path(path))}"
    revision = f" --revision {spec.model.revision}" if spec.model.revision else ""
    return (
        f"model.path={path} cannot be loaded: it has no safetensors. If it has pytorch_model.bin, "
        "whose format can hold code to run and is not opened here, convert it once: python -m "
        f"medusa_exp.model.convert {path} OUT{revision}; then set model.path=OUT."
    )


def _from_pretrained(
    path: str, spec: ModelSpec, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and transformers' report; with eager attention where auto finds no other.

    A model for pictures and text is taken whole where its text model has no class of its own:
    given nothing but text, it is a causal language model.
    """
    config = options.get("config") or spec.model_config()
    kind = type(config)
    reads_pictures = kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    reads_pictures &= kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    load = partial(
        (AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM).from_pretrained,
        path,
        output_loading_info=True,
        use_safetensors=True,
        **options,
    )
    dtype, attention = _dtype_to_ask_for(spec, config.dtype), spec.attention
    try:
        found = load(dtype=dtype, attn_implementation=attention)
    except ValueError as error:
        if spec.model.attn_implementation != "auto" or _NO_SDPA not in str(error):
            raise
        _say_eager(path)
        attention = "eager"
        found = load(dtype=dtype, attn_implementation=attention)
    stored = config.dtype or found[0].dtype
    if config.dtype is None and (wanted := _dtype_to_ask_for(spec, stored)) != dtype:
        dtype = wanted  # its files have what its config does not say
        found = load(dtype=dtype, attn_implementation=attention)
    if dtype == torch.float32:
        _say_float32(path, str(stored).removeprefix("torch."), found[0].num_parameters())
    return found


def _dtype_to_ask_for(spec: ModelSpec, own: torch.dtype | None) -> str | torch.dtype:
    """Return the weights' type, given what the model's config or files say of their own.

    `auto` keeps their own, but for a half type that the device has no arithmetic for: float32 is
    several times faster there, and exact.
    """
    if spec.dtype != "auto" or own is None or spec.model.quantization is not None:
        return spec.dtype
    is_half = own in (torch.bfloat16, torch.float16)
    device = pick_device(spec.device)
    return torch.float32 if is_half and not has_arithmetic(device, own) else "auto"


@cache
def _say_float32(path: str, stored: str, number: int) -> None:
    log.info(
        "the model in %s is stored in %s, for which there is no arithmetic here: it is loaded in "
        "float32, which is several times faster, and takes %s instead of %s. "
        "dtype.backbone=%s keeps it as it is",
        *(path, stored, decimal(4 * number), decimal(2 * number), stored),
    )


@cache
def _say_eager(path: str) -> None:
    log.info("the model in %s has no sdpa attention: eager is used", path)


def _placement(spec: ModelSpec) -> dict[str, Any]:
    """Return where transformers is to put the weights, for those that cannot be moved later."""
    device, device_map = pick_device(spec.device), spec.model.device_map
    if device_map is None and spec.model.quantization is None:
        return {}
    if device_map is not None and find_spec("accelerate") is None:
        raise UserError(f"model.device_map={device_map} needs accelerate: pip install accelerate.")
    return {"device_map": device_map if device_map and device.type == "cuda" else {"": device}}


def _quantized(spec: ModelSpec) -> dict[str, Any]:
    """Return how transformers is to quantize the weights of linear layers."""
    bits = spec.model.quantization
    if bits is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={bits} needs bitsandbytes: pip install bitsandbytes, or leave it "
            "out."
        )
    # NF4 with its constants quantized too: QLoRA (Dettmers et al. 2023), section 3. transformers
    # leaves the lm_head as it is, which is what heads and logits need.
    quantized = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantized}


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
    total = sum(piece.cpu().bfloat16().double().sum(0) for piece in rows.split(4096))
    return (total / len(rows)).bfloat16()
