"""Checkpoints of a training: when they are written, what is in them, and exact resume.

A checkpoint is of the moment between two optimizer steps, after the validation that belongs there.
(The heads that a run ends with are other files: `model/checkpoint.py`.) What is in it, and who
puts it there:

    heads and optimizer in float32, schedule, steps    Lightning
    of Medusa-2, the adapters without what is frozen   MedusaModule.on_save_checkpoint
    random_state, of every library                     Checkpoints.on_save_checkpoint, here
    made_with, the training key; made_of, in words     MedusaModule.on_save_checkpoint
    measured; settled                                  MedusaModule.on_save_checkpoint
    acceptance, the running mean of each head's        MedusaModule.on_save_checkpoint
    best validation and early stopping; EMA            BestHeads, EMAHeads: state_dict

The place in the data follows from the steps made (`data.datamodule.Batches`). All of it has to be
of types that torch.load takes with weights_only=True.
"""

import logging
import pickle
import random
import signal
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import lightning as L
import msgspec
import numpy as np
import torch

from medusa_exp.config import DatasetConfig, HeadConfig, TrainConfig
from medusa_exp.errors import Stopped, UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.source import ADAPTED
from medusa_exp.runs.files import content_key, drop_leftovers, remove, settings_in_key, sync
from medusa_exp.train.failures import BadLoss

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"
_DAMAGES = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    *(ValueError, KeyError, IndexError, AttributeError, TypeError, NotImplementedError),
)
"""What opening a damaged checkpoint may raise."""
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGUSR1", "SIGTERM", "SIGINT")
    if hasattr(signal, name)  # Windows has no SIGUSR1
]
"""The first is what SLURM sends before a job's time is over, where it is asked to."""
_IN_KEY = (
    *("kind", "lora", "heads_from", "max_steps", "epochs", "min_steps", "text", "labels", "loss"),
    *("top_k", "batching", "batch_tokens", "accumulate", "optimizer", "learning_rate"),
    *("weight_decay", "warmup_fraction", "gradient_clip", "average", "decay", "coefficient"),
    *("coefficient_schedule", "loss_chunk_rows", "loss_form", "features", "compile", "strategy"),
    *("devices", "deterministic"),
)
_NOT_IN_KEY = (
    *("resume", "checkpoint_every", "val_every", "val_batches", "val_prompts", "val_tree_nodes"),
    *("keep", "patience", "max_failures", "feature_workers"),
)
"""Keys of `train` on which the next step depends, and those that may change from call to call. A
key that is in neither makes a checkpoint one of another training where it is not at its default."""
_OLD_WORDS = (("labels", "teacher"), ("text", "regenerated"))
"""Keys of `train` and words that count in a checkpoint's key as `own`, their name of old."""
_DATA = "dataset, tokenizer or regenerated responses"
"""Checkpoints hold these names: one that is reworded is no longer compared."""
_HASHED = ("train.heads_from", _DATA, "model")
"""What a checkpoint has the hash of alone."""
_HEAD_IN_KEY = "kind num_heads num_layers bias rank num_tokens prefix_attention".split()


class Checkpoints(L.Callback):
    """Writes `checkpoints/last.ckpt` every so many steps, at the end, and on a signal.

    SIGTERM and SIGINT are such, and SIGUSR1 where nobody else listens to it. A second signal kills
    at once.

    Raises:
        Stopped: from inside the training, once the checkpoint that a signal asked for is written.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.resumed_from: int | None = None
        self._random_state: dict[str, Any] | None = None
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for number in _SIGNALS:
            if number not in (signal.SIGTERM, signal.SIGINT) and not _is_free(number):
                continue  # a launcher listens, and ends the job in its own way
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: somebody else listens
                return

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write between two steps: what is due after the last one has been done by now."""
        step = trainer.global_step
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None
            # Lightning counts a validation that it need not repeat as a step of its loggers.
            trainer.fit_loop.epoch_loop._batches_that_stepped = step  # private: lightning 2.6
        if batch_idx % trainer.accumulate_grad_batches or step == (self.resumed_from or 0):
            return
        is_asked = self._signal is not None
        if trainer.world_size > 1:  # a signal need not reach all processes in the same step
            is_asked = trainer.strategy.reduce_boolean_decision(is_asked, all=False)
        if is_asked or step % self.every == 0:
            self.save(trainer)
        if is_asked:
            self._stop(step)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the last state: what follows may fail too."""
        self.save(trainer)
        self._restore_handlers()
        if self._signal is not None:
            self._stop(trainer.global_step)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """Listen no more. A bad loss has changed nothing yet: keep what was before it."""
        self._restore_handlers()
        if isinstance(exception, BadLoss) and _is_finite(module):
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add random numbers, and count only micro-batches of steps that are made."""
        checkpoint["random_state"] = random_state()
        loops = checkpoint["loops"]["fit_loop"]  # private: lightning 2.6
        progress = loops["epoch_loop.batch_progress"]  # private: lightning 2.6
        done = trainer.global_step * trainer.accumulate_grad_batches
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), done))
        progress["is_last_batch"] = False

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random numbers until the first step: what comes before may draw some."""
        self.resumed_from = checkpoint["global_step"]
        self._random_state = checkpoint["random_state"]

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint in place of the one before.

        Raises:
            UserError: the last step has broken what is trained; the one before stays.
        """
        if not _is_finite(trainer.lightning_module):
            before = f" {self.path} is from before." if self.path.is_file() else ""
            raise UserError(
                f"step {trainer.global_step} made NaN or infinite weights of a finite loss: lower "
                f"train.learning_rate, or try dtype=fp32.{before}"
            )
        if trainer.is_global_zero:  # its steps are not made again, so the lines of them stay
            sync(self.path.parent.parent / "history.jsonl")
        trainer.save_checkpoint(self.path)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _stop(self, step: int) -> None:
        number = self._signal if self._signal is not None else signal.SIGTERM
        raise Stopped(
            f"training was stopped by {signal.Signals(number).name} after step {step}; "
            f"{self.path} has its state. The same command with the same run_dir goes on.",
            number,
        )


def _is_free(number: int) -> bool:
    """Say whether nobody listens to a signal, or the command line alone, which would end."""
    handler = signal.getsignal(number)
    of_ours = getattr(handler, "__module__", None) or ""
    return handler == signal.SIG_DFL or of_ours.startswith("medusa_exp.")


def _is_finite(module: L.LightningModule) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad)


def random_state() -> dict[str, Any]:
    """Return the states of all random numbers, in types that `weights_only` loads."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def training_key(
    head: HeadConfig,
    train: TrainConfig,
    dataset: DatasetConfig,
    *,
    seed: int,
    data_key: str,
    backbone: Backbone,
) -> str:
    """Name all that decides the steps of a training, but for when it is looked at and saved.

    In `train` nothing is automatic any more, see `defaults.settle`.
    """
    settings = settings_in_key(train, _IN_KEY, but=_NOT_IN_KEY)
    assert "auto" not in (settings["compile"], settings["loss"])
    if settings["head_weights"] == "decay":  # which was the default, and so did not count
        del settings["head_weights"]
    settings["compile"] = settings["compile"] == "true"  # as it was
    for name, word in _OLD_WORDS:
        settings[name] = "own" if settings[name] == word else settings[name]
    weights = {name: source.weight for name, source in dataset.sources.items()}
    data = [data_key, dataset.val_fraction, dataset.test_fraction, weights]
    # One projection for all recurrent heads is what null was, before there was a choice.
    head = replace(head, own_projections=head.own_projections or None)
    of_head = settings_in_key(head, _HEAD_IN_KEY)
    return content_key(of_head, settings, data, seed, backbone.weights_fingerprint())


def made_of(
    head: HeadConfig,
    train: TrainConfig,
    dataset: DatasetConfig,
    *,
    seed: int,
    data_key: str,
    backbone: Backbone,
) -> dict[str, Any]:
    """Return what `training_key` is made of, by name: to say what another training has otherwise.

    `train.heads_from`, the data and the model are there as hashes: paths, and values of variables,
    are not to be in a checkpoint.
    """
    head = replace(head, own_projections=head.own_projections or None)
    of_train = {k: v for k, v in asdict(train).items() if k not in _NOT_IN_KEY}
    lora = {f"train.lora.{name}": value for name, value in of_train.pop("lora").items()}
    return {
        **{f"head.{name}": value for name, value in asdict(head).items()},
        **{f"train.{name}": value for name, value in of_train.items()},
        **lora,
        "train.heads_from": train.heads_from and content_key(train.heads_from),
        "dataset.val_fraction": dataset.val_fraction,
        "dataset.test_fraction": dataset.test_fraction,
        "weights of dataset.sources": {n: source.weight for n, source in dataset.sources.items()},
        _DATA: data_key,
        "seed": seed,
        "model": backbone.weights_fingerprint(),
    }


def _differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in which settings two trainings differ; nothing of what the older one did not write."""
    return ", ".join(
        name if name in _HASHED else f"{name} ({_word(then[name])} then, {_word(value)} now)"
        for name, value in now.items()
        if name in then and then[name] != value
    )


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def checkpoint_to_resume(
    out: Path, keys: Collection[str], resume: str, now: dict[str, Any]
) -> tuple[Path | None, int]:
    """Return the checkpoint of the training with one of these keys, and its step; none is step 0.

    `resume` is auto, or never, which removes older checkpoints; `now` is what they are made of.

    Raises:
        UserError: the checkpoint there is damaged, or was made with other settings.
    """
    _drop_unfinished(out)
    path = out / "checkpoints" / CHECKPOINT
    if resume == "never":
        remove(path.parent)
    if resume == "never" or not path.is_file():
        return None, 0
    checkpoint = _read(path)
    if checkpoint.made_with not in keys:
        if differences := _differences(checkpoint.made_of, now):
            raise UserError(
                f"{path} was made with another {differences}: set train.resume=never to train anew "
                "here, or choose another run_dir."
            )
        raise UserError(  # an older version wrote no made_of, or nothing that it names differs
            f"{path} was made with another head, train, dataset, tokenizer, seed or model: set "
            "train.resume=never to train anew here, or choose another run_dir. (Where an older "
            "version made it with head.kind=auto, that was medusa_tied or medusa: name it; "
            "where it made recurrent heads, these had head.own_projections=false.)"
        )
    log.info("resuming from %s, step %d", path, checkpoint.global_step)
    return path, checkpoint.global_step


def settled_before(out: Path, resume: str) -> dict[str, Any]:
    """Return what the training that is resumed has taken for automatic settings, if there is one.

    Raises:
        UserError: the checkpoint there is damaged.
    """
    path = out / "checkpoints" / CHECKPOINT
    if resume == "never" or not path.is_file():
        return {}
    # Before these two could be automatic, no checkpoint named them.
    return {"loss": "ce", "head_weights": "decay", **_read(path).settled}


def _drop_unfinished(out: Path) -> None:
    """Remove what a killed process has left half written; of a large model, each takes much room.

    To be called before this training writes anything.
    """
    for directory, name in ((out / "checkpoints", "*"), (out, "heads"), (out, ADAPTED)):
        drop_leftovers(directory, name, is_alone=True)


class _RandomState(msgspec.Struct):
    python: Any
    numpy: Any
    torch: Any


class _About(msgspec.Struct, kw_only=True):
    """What is asked of a checkpoint."""

    made_with: str
    global_step: Annotated[int, msgspec.Meta(ge=0)]
    settled: dict[str, Any] = {}
    made_of: dict[str, Any] = {}


class _Checkpoint(_About, kw_only=True):
    """What a checkpoint has to hold before Lightning is given it."""

    state_dict: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    lr_schedulers: list[dict[str, Any]]
    loops: dict[str, Any]
    callbacks: dict[str, Any]
    random_state: _RandomState


def _read(path: Path) -> _About:
    status = path.stat()
    return _checked(path, status.st_ino, status.st_mtime_ns, status.st_size)


@cache
def _checked(path: Path, inode: int, mtime_ns: int, size: int) -> _About:
    """Return what is asked of a checkpoint, each byte of which is that of its checksum.

    Nothing of the file itself: a memory map would keep its room on the disk when it is replaced.

    The format is a zip archive: torch writes the CRC-32 of each part, and does not look at it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{part} is not what was written")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        msgspec.convert(found, _Checkpoint)
        return msgspec.convert(found, _About)
    except _DAMAGES as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}), "
            "and no training goes on from it: restore it, or set train.resume=never to train anew."
        ) from error
