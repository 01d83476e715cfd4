"""Which checkpoint a training goes on from."""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.source import ADAPTED
from medusa_exp.runs.files import content_key, settings_in_key
from medusa_exp.train.checkpointing import CHECKPOINT

_OF_STEPS = (
    *("kind", "lora", "heads_from", "max_steps", "epochs", "min_steps", "text", "labels", "loss"),
    *("top_k", "batching", "batch_tokens", "accumulate", "optimizer", "learning_rate"),
    *("weight_decay", "warmup_fraction", "gradient_clip", "average", "decay", "coefficient"),
    *("coefficient_schedule", "loss_chunk_rows", "loss_form", "features", "compile", "strategy"),
    *("devices", "deterministic"),
)
_NOT_OF_STEPS = (
    *("resume", "checkpoint_every", "val_every", "val_batches", "val_prompts", "val_tree_nodes"),
    *("keep", "patience", "max_failures", "feature_workers"),
)
"""Keys of `train` on which the next step depends, and those that may change from call to call. A
key that is in neither makes a checkpoint one of another training where it is not at its default."""
_OF_HEADS = "kind num_heads num_layers bias rank num_tokens prefix_attention".split()

log = logging.getLogger(__name__)


def made_with(config: Config, data_key: str, backbone: Backbone) -> str:
    """Name all that decides the steps of a training, but for when it is looked at and saved."""
    train = settings_in_key(config.train, _OF_STEPS, but=_NOT_OF_STEPS)
    head = settings_in_key(config.head, _OF_HEADS)
    dataset = config.dataset
    weights = {name: source.weight for name, source in dataset.sources.items()}
    data = [data_key, dataset.val_fraction, dataset.test_fraction, weights]
    return content_key(head, train, data, config.seed, backbone.weights_identity())


def checkpoint_to_resume(config: Config, out: Path, key: str) -> tuple[Path | None, int]:
    """Return the checkpoint to go on from, and its step; none is step 0.

    With train.resume=never, older ones are removed.

    Raises:
        UserError: the checkpoint there is damaged, or was made with other settings.
    """
    _drop_unfinished(out)
    path = out / "checkpoints" / CHECKPOINT
    if config.train.resume == "never":
        shutil.rmtree(path.parent, ignore_errors=True)
        return None, 0
    if not path.is_file():
        return None, 0
    checkpoint = _read(path)
    if checkpoint.get("made_with") != key:
        raise UserError(
            f"{path} was made with another head, train, dataset, tokenizer, seed or model: set "
            "train.resume=never to train anew here, or choose another run_dir."
        )
    log.info("going on from %s, step %d", path, checkpoint["global_step"])
    return path, int(checkpoint["global_step"])


def _drop_unfinished(out: Path) -> None:
    """Remove what a killed process has left half written; of a large model, each takes much room.

    To be called before this training writes anything.
    """
    for pattern in ("checkpoints/.*.partial-*", ".heads.partial-*", f".{ADAPTED}.partial-*"):
        for unfinished in out.glob(pattern):
            if unfinished.is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)  # another process may be quicker
            else:
                unfinished.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:  # the last is torch's
        raise UserError(
            f"{path} is damaged ({type(error).__name__}), and no training goes on from it: restore "
            "it, or set train.resume=never to train anew."
        ) from error
    return found
