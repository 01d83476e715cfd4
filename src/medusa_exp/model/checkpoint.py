"""Save and load heads: `heads/config.json` and `heads/model.safetensors`."""

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel

from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.runs.files import publish, sha256_file

WEIGHTS = "model.safetensors"


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


def find_heads(key: str, named: str) -> Path:
    """Return the directory of the heads that a key of the config names.

    Raises:
        UserError: it holds none, and is no run directory that does.
    """
    path = Path(named).expanduser()
    for place in (path, path / "heads"):
        if (place / "config.json").is_file() and (place / WEIGHTS).is_file():
            return place
    raise UserError(f"{key}={named} holds no heads: name a run directory or its heads/.")


def adopt_heads(heads_from: str, out: Path) -> None:
    """Put the heads of another run into a run directory.

    Files are linked, where the file system can: heads are never written into, only replaced.

    Raises:
        UserError: there are none, or the run directory has others already.
    """
    source, target = find_heads("heads_from", heads_from), out / "heads"
    if not target.exists():
        with publish(target) as partial:
            shutil.copytree(source, partial, copy_function=_link)
    elif sha256_file(source / WEIGHTS) != sha256_file(target / WEIGHTS):
        raise UserError(
            f"heads_from={heads_from} names other heads than those in {target}: "
            "take another run_dir."
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def check_fit(heads: MedusaHeads, backbone: Backbone, place: Path) -> None:
    """Raise a UserError that says in what the heads' backbone differs from this one."""
    config, name = heads.config, backbone.model.config.name_or_path
    for what, theirs, ours in (
        ("hidden size", config.hidden_size, backbone.hidden_size),
        ("vocabulary", config.vocab_size, backbone.vocab_size),
        ("identity", config.backbone_identity, backbone.identity()),
    ):
        if theirs == "":  # imported heads seldom say
            continue
        if theirs != ours:
            raise UserError(
                f"the heads in {place} were trained for {config.backbone}, whose {what} is "
                f"{theirs}; the model in {name} has {ours}. Load that model, or train heads for "
                "this one."
            )
