"""The model card of a run's heads: what run directory, config and model say of them."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from medusa_exp.config import Config, TrainConfig
from medusa_exp.config.privacy import shareable_text
from medusa_exp.errors import UserError
from medusa_exp.export.card import Facts, run_card
from medusa_exp.runs.files import publish, read_json
from medusa_exp.runs.seals import check_heads
from medusa_exp.tracking.terminal import headlines

CARD = "README.md"
_UNKNOWN = "unknown"


def write_card(config: Config, out: Path) -> None:
    """Write README.md of the run's heads, if there are some, and it would say something new.

    Raises:
        UserError: the heads are damaged, or no file can be written there.
    """
    place = out / "heads"
    if not (place / "config.json").is_file():
        return
    check_heads(place)
    heads = read_json(place / "config.json", {}, dict[str, Any])
    what = f"{heads.get('num_heads')} Medusa heads of kind {heads.get('kind')}"
    target = config.model.path or "a model of stage pretrain"
    text = run_card(facts_of(config, out, target), what)
    path = place / CARD
    if path.is_dir():
        raise UserError(f"{path} is a directory, and the model card should be there: move it away.")
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        with publish(path) as partial:  # a file of its own: heads of another run are linked here
            partial.write_text(text, encoding="utf-8")


def facts_of(config: Config, out: Path, target: str) -> Facts:
    """Return what a card says of a run.

    Args:
        config: of the run.
        out: its directory.
        target: directory or hub name by which the model is loaded.
    """
    record, metrics = read_json(out / "run.json", {}), read_json(out / "metrics.json", {})
    is_on_hub = _is_on_hub(target)
    return Facts(
        title=f"Medusa heads of {config.name}",
        target=target if is_on_hub else shareable_text(target),
        is_on_hub=is_on_hub,
        license=config.export.license or _UNKNOWN,
        target_license=license_of(config.model.path, config.model.revision),
        trained=_trained(
            config, read_json(out / "heads" / "config.json", {}, dict[str, Any]), record, metrics
        ),
        measured=list(headlines(metrics)),
        hardware=record.get("device", "an unknown machine"),
        date=str(record.get("created", ""))[:10],
    )


def _trained(
    config: Config, heads: dict[str, Any], record: dict[str, Any], metrics: dict[str, float]
) -> dict[str, Any]:
    if config.heads_from is not None:
        return {"heads": f"taken from {Path(config.heads_from).name}: see there"}
    train = config.train
    backbone = "frozen"
    if train.kind != "medusa1":
        backbone = "adapted together with the heads, which belong to it as it is in backbone/"
    return {
        # As they are, for the config may have left it to them: head.kind=auto.
        "heads": f"{heads.get('num_heads')} of kind {heads.get('kind')}",
        "residual blocks": heads.get("num_layers", _UNKNOWN),
        "tokens that they know": heads.get("num_tokens") or "all",
        "data": config.dataset.kind if not config.dataset.path else Path(config.dataset.path).name,
        "text": train.text,
        "labels, loss": f"{train.labels}, {_loss_of(train, record)}",
        "backbone": backbone,
        "steps": metrics.get("train/steps", _UNKNOWN),
        "commit of medusa_exp": record.get("git", {}).get("commit") or _UNKNOWN,
    }


def _loss_of(train: TrainConfig, record: dict[str, Any]) -> str:
    """Return what the training has taken, however decoding is set now."""
    settled = record.get("stages", {}).get("train", {}).get("settled", {})
    return settled.get("loss", _UNKNOWN if train.loss == "auto" else train.loss)


def _is_on_hub(model: str) -> bool:
    """Is this the name of a model on the hub, and no directory, of this folder or another?"""
    if model.count("/") != 1 or Path(model).expanduser().exists():
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def license_of(model: str | None, revision: str | None = None) -> str:
    """Return the license that a model's own card names, or unknown; nothing is asked of a network.

    Args:
        model: directory, or a name on the hub, whose card may lie in the hub's cache.
        revision: of the hub's.
    """
    found: Any = None
    if model is not None and (place := Path(model).expanduser()).is_dir():
        found = place / CARD
    elif model is not None and _is_on_hub(model):
        found = try_to_load_from_cache(model, CARD, revision=revision)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return _UNKNOWN
    try:
        metadata = metadata_load(found) or {}
    except (ValueError, yaml.YAMLError, RecursionError):
        return _UNKNOWN
    name = metadata.get("license_name") or metadata.get("license")
    words = re.sub(r"[^\w.+-]", " ", str(name)).split() if isinstance(name, str) else []
    return " ".join(words)[:80] or _UNKNOWN
