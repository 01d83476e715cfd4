"""Heads to and from `heads/config.json` and `heads/model.safetensors`."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel

from medusa_exp.errors import UserError
from medusa_exp.files import publish
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads


def save_heads(heads: MedusaHeads, path: Path) -> None:
    """Write the heads' directory, whole or not at all."""
    with publish(path) as partial:
        heads.save_pretrained(partial)


def load_heads(path: str | Path, model: PreTrainedModel | Backbone | None = None) -> MedusaHeads:
    """Load heads, in the dtype and on the device of the backbone where one is given.

    Raises:
        UserError: there are none, or they were trained for another backbone; says what differs.
    """
    place = Path(path)
    if not (place / "config.json").is_file():
        raise UserError(f"{place} holds no heads (config.json is missing): run stage train first.")
    try:
        heads, report = AutoModel.from_pretrained(place, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the heads in {place} cannot be loaded: {error}") from error
    if not isinstance(heads, MedusaHeads):
        raise UserError(f"{place} holds a {type(heads).__name__}, not Medusa heads.")
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(f"{place}/model.safetensors does not fit its config.json: {wrong[:4]}.")
    if model is None:
        return heads
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    check_fit(heads, backbone, place)
    heads.attach(backbone)
    return heads.to(backbone.device, backbone.lm_head.weight.dtype).eval()


def check_fit(heads: MedusaHeads, backbone: Backbone, place: Path) -> None:
    """Raise a UserError that says in what the heads' backbone differs from this one."""
    config = heads.config
    name = backbone.model.config.name_or_path
    for what, theirs, ours in (
        ("hidden size", config.hidden_size, backbone.hidden_size),
        ("vocabulary", config.vocab_size, backbone.vocab_size),
        ("identity", config.backbone_identity, backbone.identity()),
    ):
        if theirs != ours:
            raise UserError(
                f"the heads in {place} were trained for {config.backbone}, whose {what} is "
                f"{theirs}; the model in {name} has {ours}. Load that model, or train heads for "
                "this one."
            )
