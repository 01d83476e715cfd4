"""A moving average of the heads, which is validated and kept in their place.

Keeps the heads of the best validation, and stops where none has been better for long.

What a training will take, shown before its first step.

One micro-batch is run forward and backward twice, without effect on anything: the first time
prepares kernels, the second one is timed.

The progress of a training where there is no terminal to draw Lightning's bar on.
"""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa_exp.data.datamodule import Batch
from medusa_exp.errors import UserError
from medusa_exp.runs.files import publish
from medusa_exp.runs.progress import progress_bar
from medusa_exp.runs.record import peak_memory_bytes
from medusa_exp.train.checkpointing import random_state, restore_random_state
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.optimizer import STATE_BYTES


class EMAHeads(L.Callback):
    """After each step: average = decay * average + (1 - decay) * heads."""

    def __init__(self, decay: float, module: nn.Module) -> None:
        self.decay = decay
        self.module = module
        self.average = [p.clone() for p in self._parameters()]
        self._is_swapped = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Follow the heads, where the micro-batch was the last of its step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            torch._foreach_lerp_(self.average, self._parameters(), 1 - self.decay)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate the average."""
        self.swap(True)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Go on training the heads. Callbacks that keep heads must stand before this one."""
        self.swap(False)

    def swap(self, is_wanted: bool) -> None:
        """Put the average in the heads' place, or the heads back in theirs."""
        if is_wanted != self._is_swapped:
            with torch.no_grad():
                for average, parameter in zip(self.average, self._parameters(), strict=True):
                    kept = parameter.clone()
                    parameter.copy_(average)
                    average.copy_(kept)
            self._is_swapped = is_wanted

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        assert not self._is_swapped
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        for average, saved in zip(self.average, state_dict["average"], strict=True):
            average.copy_(saved)

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.module.parameters() if p.requires_grad]


log = logging.getLogger(__name__)

METRIC = "val/accept_length"


class BestHeads(L.Callback):
    """Writes the heads of the greatest `val/accept_length` beside the checkpoints.

    What is best is part of a checkpoint: a training that goes on from one forgets what was found
    later, and looks anew. The file that the newest checkpoint names is kept until a newer one names
    another: on a device that does not repeat itself, the second look may find less.
    """

    def __init__(self, directory: Path, patience: int | None = None) -> None:
        self.directory = directory
        self.patience = patience
        self._saved_step = 0
        self.value: float | None = None
        self.step = 0
        self.num_worse = 0
        self.metrics: dict[str, float] = {}
        """Of the best validation."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compare."""
        value = trainer.callback_metrics.get(METRIC)
        if value is None:
            return
        # What the first process finds, for all: they stop at the same step, whatever rounds where.
        value = trainer.strategy.broadcast(float(value))
        if self.value is None or value > self.value:
            self.value, self.step, self.num_worse = value, trainer.global_step, 0
            found = trainer.callback_metrics.items()
            self.metrics = {name: float(x) for name, x in found if name.startswith("val/")}
            if trainer.is_global_zero:
                self._write(module)
            return
        self.num_worse += 1
        if self.patience is not None and self.num_worse >= self.patience:
            log.info("%s was best at step %d: training stops", METRIC, self.step)
            trainer.should_stop = True

    def _write(self, module: L.LightningModule) -> None:
        with publish(self._file(self.step)) as partial:
            save_file(_trained(module), partial)
        self._tidy()

    def _tidy(self) -> None:
        for path in self.directory.glob("best-*.safetensors"):
            if path not in (self._file(self.step), self._file(self._saved_step)):
                path.unlink()

    def _file(self, step: int) -> Path:
        return self.directory / f"best-{step}.safetensors"

    @torch.no_grad()
    def restore(self, module: L.LightningModule) -> None:
        """Put the best in place of the last.

        Raises:
            UserError: their file is gone or damaged.
        """
        if rank_zero_only.rank:  # of several processes the first one alone writes, and goes on
            return
        path = self._file(self.step)
        try:
            best = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is missing or damaged, the heads of the best validation: restore it, or "
                "set train.keep=last to keep those of the last step."
            ) from error
        for name, value in _trained(module).items():
            value.copy_(best[name])
        self._tidy()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        self._saved_step = self.step
        names = ("value", "step", "num_worse", "metrics")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._saved_step = self.step


def _trained(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


class TrainingPreview(L.Callback):
    """Prints a table before the first step of each call; with several processes, nothing."""

    def __init__(self, optimizer: str, has_average: bool) -> None:
        self.optimizer = optimizer
        self.has_average = has_average
        self._is_shown = False

    def on_train_batch_start(
        self, trainer: L.Trainer, module: MedusaModule, batch: Batch, batch_idx: int
    ) -> None:
        """Time the first micro-batch, and print."""
        if self._is_shown or trainer.world_size > 1:
            return
        self._is_shown = True
        seconds = _time_batch(trainer, module, batch)
        steps = trainer.max_steps - trainer.global_step
        accumulate = trainer.accumulate_grad_batches
        table = Table("the training", "", title=None)
        for name, value in (
            ("parameters trained", f"{_num_parameters(module) / 1e6:.2f} M"),
            ("memory of them, gradients and optimiser", _bytes(self._memory(module))),
            ("peak memory so far", _bytes(peak_memory_bytes(module.device))),
            ("tokens of a step, with padding", f"{accumulate * batch.input_ids_BT.numel():,}"),
            ("labels of a step, of head 1", f"{batch.group_labels[1]:,}"),
            ("steps", f"{steps:,}"),
            ("time, about", _duration(steps * accumulate * seconds)),
        ):
            table.add_row(name, value)
        Console().print(table)

    def _memory(self, module: MedusaModule) -> int:
        each = 4 + 4 + STATE_BYTES[self.optimizer] + 4 * self.has_average
        return each * _num_parameters(module)


def _time_batch(trainer: L.Trainer, module: MedusaModule, batch: Batch) -> float:
    state = random_state()
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with trainer.precision_plugin.train_step_context():
            loss = module.largest_loss(batch, batch.group_labels)[0]
        loss.backward()
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        module.zero_grad(set_to_none=True)
    restore_random_state(state)
    return seconds


def _num_parameters(module: MedusaModule) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class StepProgress(L.Callback):
    """Counts optimiser steps, in the first of several processes; see `runs/progress.py`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._open = ExitStack()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._done = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin where the training does."""
        if trainer.is_global_zero:
            self._done = trainer.global_step
            self._bar = self._open.enter_context(progress_bar())
            self._task = self._bar.add_task(
                self.what, total=trainer.max_steps, completed=self._done
            )

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any, **more: Any) -> None:
        """Go on by the steps made."""
        if self._bar is not None and (made := trainer.global_step - self._done):
            self._bar.advance(self._task, made)
            self._done += made

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Show how far it came."""
        self._open.close()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """Show how far it came."""
        self._open.close()
