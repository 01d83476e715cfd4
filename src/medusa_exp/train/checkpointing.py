"""When a training writes its checkpoint, and all that it needs to go on as if nothing had been.

A checkpoint is of the moment between two optimiser steps, after the validation that belongs there.
(The heads that a run ends with are other files: `model/checkpoint.py`.) What is in it, and who
puts it there:

    heads and optimiser in float32, schedule, steps    Lightning
    of Medusa-2, the adapters without what is frozen   JointModule.on_save_checkpoint
    random_state, of every library                     Checkpoints.on_save_checkpoint, here
    made_with, measured                                MedusaModule.on_save_checkpoint
    the best validation; the moving average            BestHeads, AverageHeads: state_dict

The place in the data follows from the steps made (`data.loader.Batches`). All of it has to be of
types that torch.load takes with weights_only=True.
"""

import random
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch

from medusa_exp.errors import Stopped, UserError
from medusa_exp.train.failures import BadLoss

CHECKPOINT = "last.ckpt"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Checkpoints(L.Callback):
    """Writes `checkpoints/last.ckpt` every so many steps, at the end, and on SIGTERM and SIGINT.

    A second signal kills at once.

    Raises:
        Stopped: from inside the training, once the checkpoint that a signal asked for is written.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.resumed_from: int | None = None
        self._random_state: dict[str, Any] | None = None
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Listen to signals."""
        for number in _SIGNALS:
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
            trainer.fit_loop.epoch_loop._batches_that_stepped = step
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
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
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
