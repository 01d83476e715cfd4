"""LoRA adapters on the backbone, for Medusa-2: add, save and load them.

The saved model lies in the run directory, in `backbone/`, and later stages decode with it.
"""

import hashlib
import logging
import warnings
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_exp.config import LoraSettings
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.source import ADAPTED
from medusa_exp.runs.files import publish

log = logging.getLogger(__name__)


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
    )
    try:
        adapted = get_peft_model(backbone.model, lora)
    except ValueError as error:
        if "lora_dropout" in str(error):  # of experts whose weights lie in one tensor
            raise UserError(
                f"train.lora.dropout={settings.dropout}: {backbone.name} has weights that are "
                "adapted without dropout alone. Set train.lora.dropout=0."
            ) from error
        raise UserError(f"train.lora.layers={settings.layers}: {error}") from error
    if settings.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.model.enable_input_require_grads()
    return adapted


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
    log.info("the backbone with its adapters (%s) written to %s", output, out / ADAPTED)


def mark(backbone: Backbone, adapted: PreTrainedModel) -> None:
    """Name the adapters in the model's config, so that heads know this backbone from others."""
    digest = hashlib.sha256()
    for name, value in sorted(adapted.named_parameters()):
        if "lora_" in name:
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    backbone.model.config.medusa_adapter = digest.hexdigest()


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
