"""LoRA adapters on the backbone, for Medusa-2: add, save and load them.

The saved model lies in the run directory, in `backbone/`, and later stages decode with it.
"""

import copy
import hashlib
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_exp.config import LoraSettings
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.source import ADAPTED
from medusa_exp.runs.files import publish
from medusa_exp.runs.seals import seal

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)

_OF_MAMBA = ["out_proj", "conv1d"]
"""Modules that peft refuses on models of Mamba's kinds."""


def add_adapters(backbone: Backbone, settings: LoraSettings) -> PreTrainedModel:
    """Put LoRA into the backbone's linear layers; return peft's model, which trains it alone.

    Raises:
        UserError: peft is not installed, or the named layers cannot be adapted.
    """
    if "lm_head" in settings.layers:
        raise UserError(
            "train.lora.layers: the lm_head stays as it is, for heads know their backbone by it."
        )
    if getattr(backbone.model, "is_quantized", False) and settings.output == "merged":
        raise UserError(
            "train.lora.output=merged: quantized weights cannot take adapters in without loss. Set "
            "train.lora.output=adapter, or leave model.quantization out."
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("train=medusa2 needs peft: pip install 'medusa-exp[lora]'.") from error
    _ignore_expected_warnings()
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.layers) or "all-linear",
        exclude_modules=None if settings.layers else _layers_of_another_kind(backbone.model),
    )
    is_of_mamba = False
    while (fault := _try_without_weights(backbone.model, lora)) is not None:
        if "lora_dropout" in fault and lora.lora_dropout:  # experts whose weights lie in one tensor
            log.warning(
                "%s is adapted without dropout (train.lora.dropout=%s is for layers alone, and its "
                "experts are adapted by their weights)",
                backbone.name,
                lora.lora_dropout,
            )
            lora.lora_dropout = 0.0
        elif "Mamba" in fault and not settings.layers and not is_of_mamba:
            log.warning(
                "%s is adapted without %s: they enter its recurrence by their weights",
                backbone.name,
                " and ".join(_OF_MAMBA),
            )
            lora.exclude_modules, is_of_mamba = [*(lora.exclude_modules or []), *_OF_MAMBA], True
        else:
            raise UserError(f"train.lora.layers={settings.layers}: {fault}")
    adapted = get_peft_model(backbone.model, lora)
    if settings.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.model.enable_input_require_grads()
    return adapted


def _layers_of_another_kind(model: PreTrainedModel) -> list[str] | None:
    """Name the linear layers whose forward is of an architecture's own, and gives no product.

    A router of experts, for one, returns more than that, and cannot be wrapped.
    """
    gives_product: dict[type, bool] = {nn.Linear: True}
    others = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and type(layer).__module__.startswith("transformers."):
            kind = type(layer)
            if kind not in gives_product:
                gives_product[kind] = _gives_product(layer)
            others += [] if gives_product[kind] else [name]
    return others or None


def _gives_product(layer: nn.Linear) -> bool:
    """Say whether a layer turns [1, in] into [1, out] and nothing else; tried without memory."""
    weights = {name: value.to("meta") for name, value in layer.named_parameters()}
    try:
        states = torch.empty(1, layer.in_features, dtype=layer.weight.dtype, device="meta")
        product = torch.func.functional_call(layer, weights, (states,))
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    return isinstance(product, torch.Tensor) and product.shape == (1, layer.out_features)


def _try_without_weights(model: PreTrainedModel, lora: "LoraConfig") -> str | None:
    """Return what peft has against these adapters, None where it takes them.

    Tried on a model of this config that has no memory: one that is refused stays half adapted.
    """
    from peft import get_peft_model

    with torch.device("meta"):
        trial = type(model)(copy.deepcopy(model.config))
    try:
        get_peft_model(trial, copy.deepcopy(lora))
    except ValueError as error:
        return str(error)
    return None


def save_adapted(
    adapted: PreTrainedModel,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    output: str,
) -> None:
    """Write `backbone/`: the whole model with the adapters merged into it, or the adapters alone.

    From here on the backbone is another model than the one it came from, and says so.
    """
    with publish(out / ADAPTED) as partial:
        if output == "adapter":
            adapted.save_pretrained(partial)
        mark(backbone, adapted)
        if output == "merged":
            adapted.merge_and_unload().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        seal(partial)
    log.info("the backbone with its adapters (%s) written to %s", output, out / ADAPTED)


def mark(backbone: Backbone, adapted: PreTrainedModel) -> None:
    """Name the adapters in the model's config, so that heads know this backbone from others."""
    digest = hashlib.sha256()
    for name, value in sorted(adapted.named_parameters()):
        if "lora_" in name:
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    backbone.model.config.medusa_adapter = digest.hexdigest()
    backbone.names.forget()  # it may have answered before, with packed layers


def load_adapters(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Merge the adapters in a directory into their model.

    Raises:
        UserError: they cannot be loaded.
    """
    try:
        from peft import PeftModel

        _ignore_expected_warnings()
        adapted = PeftModel.from_pretrained(model, str(path))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the adapters in {path} cannot be loaded: {error}") from error
    mark(Backbone(model), adapted)
    return adapted.merge_and_unload()


def _ignore_expected_warnings() -> None:
    # peft 0.21 asks transformers 5.23 by names that it is about to give up.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    # It converts its own pattern for fused experts to names that a model may not have.
    warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
