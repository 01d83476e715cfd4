"""Save and load heads: `heads/config.json` and `heads/model.safetensors`."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import FAMILIES, MedusaHeads
from medusa_exp.runs.files import link_or_copy, publish, read_json, remove, sha256_file
from medusa_exp.runs.seals import check_heads, seal

WEIGHTS = "model.safetensors"
Metadata = dict[str, str] | None
_MOST_HEADS, _MOST_CONFIG = 64, 1 << 20


def save_heads(heads: MedusaHeads, path: Path) -> None:
    """Write the heads' directory, whole or not at all."""
    with publish(path) as partial:
        heads.save_pretrained(partial)
        seal(partial)


def save_tensors(tensors: dict[str, Tensor], partial: Path, metadata: Metadata = None) -> None:
    """Write one file of tensors that `publish` is to publish.

    safetensors writes under a name of its own first, which nobody would clear away after a kill: so
    it does it in a directory that is named as what is half written.
    """
    beside = partial.with_name(f"{partial.name}.tensors")
    beside.mkdir()
    try:
        save_file(tensors, beside / partial.name, metadata)
        (beside / partial.name).replace(partial)
    finally:
        remove(beside)


def load_heads(path: str | Path, model: PreTrainedModel | Backbone | None = None) -> MedusaHeads:
    """Load heads, in the dtype and on the device of the backbone where one is given.

    Raises:
        UserError: there are none, or they were trained for another backbone; says what differs.
    """
    place = Path(path)
    if not (place / "config.json").is_file():
        raise UserError(f"{place} holds no heads (config.json is missing): run stage train first.")
    check_heads(place)
    _check_files(place)
    try:
        heads, report = AutoModel.from_pretrained(
            place, output_loading_info=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # of keys that transformers knows, with whatever stands under them
        raise UserError(f"the heads in {place} cannot be loaded: {error}") from error
    if not isinstance(heads, MedusaHeads):
        raise UserError(f"{place} holds a {type(heads).__name__}, not Medusa heads.")
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(f"{place}/model.safetensors does not fit its config.json: {wrong[:4]}.")
    check_weights(heads, place)
    if model is None:
        return heads
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    check_fit(heads, backbone, place)
    heads.attach(backbone)
    return heads.to(backbone.device, backbone.lm_head.weight.dtype).eval()


class _Shape(msgspec.Struct):
    """What heads/config.json has to hold before anything is built by it; see MedusaHeadsConfig."""

    model_type: Literal["medusa"]
    kind: str
    num_heads: Annotated[int, msgspec.Meta(ge=1, le=_MOST_HEADS)]
    hidden_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    num_layers: Annotated[int, msgspec.Meta(ge=0, le=_MOST_HEADS)] = 1
    bias: bool = True
    rank: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)] | None = None
    own_projections: bool = False
    prefix_attention: bool = False
    num_attention_heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 1
    lm_head_bias: bool = False
    backbone: str = ""
    backbone_identity: str = ""
    backbone_weights: str = ""
    lm_head_sha256: str = ""


def _check_files(place: Path) -> None:
    """Check what a directory of heads says of itself, before anything is built by it.

    Raises:
        UserError: config.json is not that of heads, or the weights are in no safetensors.
    """
    path = place / "config.json"
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise UserError(f"{path} is larger than {_MOST_CONFIG >> 20} MiB: it is no config.")
        shape = msgspec.json.decode(path.read_bytes(), type=_Shape)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is no config of heads: {error}. Restore it, or train the heads again."
        ) from error
    if shape.kind not in FAMILIES:
        raise UserError(
            f"{path} is no config of heads: kind={shape.kind} is none of {', '.join(FAMILIES)}. "
            "Restore it, or train the heads again."
        )
    if not (place / WEIGHTS).is_file():
        raise UserError(
            f"{place} has no {WEIGHTS}: heads are read from safetensors alone, since other formats "
            "can hold code to run. Copy that file there, or train the heads again."
        )


def check_weights(heads: MedusaHeads, place: Path) -> None:
    """Raise a UserError where weights are integers, NaN or infinite: they would propose nothing."""
    with safe_open(place / WEIGHTS, framework="pt") as file:
        for name, weights in heads.named_parameters():
            # As they are stored: loading has made floats of integers.
            is_stored = name in file.keys()  # noqa: SIM118 - it is no dictionary
            is_integer = is_stored and "F" not in str(file.get_slice(name).get_dtype())
            if is_integer or not bool(weights.isfinite().all()):
                raise UserError(
                    f"{place / WEIGHTS}: the weights {name} are integers, or not all of them are "
                    "finite numbers: restore the file, or train the heads again."
                )


def own_heads(named: str | Path) -> Path | None:
    """Return where a directory has heads of ours, in heads/ or in it; None where it has none.

    In heads/ first: beside it a whole model may lie, as `export.format=hf_generate` writes it.
    """
    path = Path(named).expanduser()
    for place in (path / "heads", path):
        config = read_json(place / "config.json", {})
        is_ours = isinstance(config, dict) and "kind" in config  # which no other format says
        if is_ours and (place / WEIGHTS).is_file():
            return place
    return None


def find_heads(key: str, named: str) -> Path:
    """Return the directory of the heads that a key of the config names.

    Raises:
        UserError: it holds none, and is no run directory that does.
    """
    if (place := own_heads(named)) is None:
        raise UserError(f"{key}={named} holds no heads: name a run directory or its heads/.")
    return place


def adopt_heads(heads_from: str, out: Path) -> None:
    """Put the heads of another run into a run directory.

    Files are linked, where the file system can: heads are never written into, only replaced.

    Raises:
        UserError: there are none, they cannot be loaded, or the run directory has others already.
    """
    source, target = find_heads("heads_from", heads_from), out / "heads"
    if target.exists():
        check_same(heads_from, source, target)
        return
    load_heads(source)  # what cannot be loaded is told of where it lies, and not put in place
    with publish(target) as partial:
        shutil.copytree(source, partial, copy_function=link_or_copy)


def check_same(heads_from: str, source: Path, target: Path) -> None:
    """Raise a UserError where the heads in a run directory are not those that are to be put there.

    Args:
        heads_from: as in the config.
        source: directory of the heads that it names.
        target: directory of those that are there.
    """
    if sha256_file(source / WEIGHTS) != sha256_file(target / WEIGHTS):
        raise UserError(
            f"heads_from={heads_from} names other heads than those in {target}: "
            "take another run_dir."
        )


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
        if theirs != ours and not (what == "identity" and backbone.names.has_identity(str(theirs))):
            raise UserError(
                f"the heads in {place} were trained for {config.backbone}, whose {what} is "
                f"{theirs}; the model in {name} has {ours}. Load that model, or train heads for "
                "this one."
            )
