"""Callbacks of a training: the best heads, early stopping, EMA, a preview of it, its progress."""

import logging
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.filesize import decimal
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medusa_exp.config import TrainConfig
from medusa_exp.data.datamodule import Batch
from medusa_exp.errors import UserError
from medusa_exp.model.checkpoint import save_tensors
from medusa_exp.runs.files import publish, sha256_file
from medusa_exp.runs.machine import gpu_memory, peak_memory_bytes, synchronize
from medusa_exp.runs.progress import ProgressBar
from medusa_exp.train.failures import memory_of_training
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.optimizer import STATE_BYTES
from medusa_exp.train.throughput import Throughput

log = logging.getLogger(__name__)

METRIC = "val/accept_length"
"""What the best heads have most of."""
PREVIEW_STEPS = 10
"""Optimizer steps from which the time of a training is estimated."""
_FULL = 0.92
"""Share of a GPU's memory above which a longer batch may be too much."""


class EMAHeads(L.Callback):
    """Exponential moving average of all that is trained; it is validated and kept in its place.

    After each optimizer step: average = decay * average + (1 - decay) * weights.
    """

    state_key = "AverageHeads"
    """By which checkpoints hold its state."""

    def __init__(self, decay: float, module: nn.Module) -> None:
        # Of the parameters alone: a copy of the module would copy the frozen backbone too.
        self.trained = nn.ParameterList([p for p in module.parameters() if p.requires_grad])
        self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.average.update_parameters(self.trained)  # the first one copies
        self._is_swapped = False

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights, where the micro-batch was the last of its step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.average.update_parameters(self.trained)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.swap(True)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Go on training the weights. Callbacks that keep heads must stand before this one."""
        self.swap(False)

    @torch.no_grad()
    def swap(self, is_wanted: bool) -> None:
        """Put the average in the weights' place, or the weights back in theirs."""
        if is_wanted != self._is_swapped:
            for average, parameter in zip(self.average.parameters(), self.trained, strict=True):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)
            self._is_swapped = is_wanted

    def state_dict(self) -> dict[str, Any]:
        assert not self._is_swapped
        return {"average": [p.detach() for p in self.average.parameters()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for average, saved in zip(self.average.parameters(), state_dict["average"], strict=True):
            average.copy_(saved)


class BestHeads(L.Callback):
    """Writes the heads of the greatest `val/accept_length` beside the checkpoints; stops early.

    What is best is part of a checkpoint: a training that resumes from one forgets what was found
    later, and looks anew. The file that the newest checkpoint names is kept until a newer one names
    another: on a device that does not repeat itself, the second look may find less.

    With `patience`, early stopping: the training ends after so many validations in a row that were
    no better.
    """

    def __init__(self, directory: Path, patience: int | None, *, is_restored: bool) -> None:
        self.directory, self.patience, self.is_restored = directory, patience, is_restored
        self._saved_step = 0
        self.value: float | None = None
        self.step = 0
        self.num_worse = 0
        self.sha256 = ""
        """Of the file of the best heads."""
        self.metrics: dict[str, float] = {}
        """Metrics of the best validation."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
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
                with publish(self._file(self.step)) as partial:
                    save_tensors(_trained(module), partial)
                self.sha256 = sha256_file(self._file(self.step))
                self._tidy()
            return
        self.num_worse += 1
        if self.patience is not None and self.num_worse >= self.patience:
            log.info("%s was best at step %d: training stops early", METRIC, self.step)
            trainer.should_stop = True

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
            self._check()
            best = load_file(path)
            for name, value in _trained(module).items():
                value.copy_(best[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise self._damaged() from error
        self._tidy()

    def _check(self) -> None:
        """Raise a UserError where the file of the best heads is not what was written."""
        path = self._file(self.step)
        if not path.is_file() or (self.sha256 and sha256_file(path) != self.sha256):
            raise self._damaged()

    def _damaged(self) -> UserError:
        return UserError(
            f"{self._file(self.step)} is missing or damaged, the heads of the best validation: "
            "restore it, or set train.keep=last to keep those of the last step."
        )

    def state_dict(self) -> dict[str, Any]:
        self._saved_step = self.step
        names = ("value", "step", "num_worse", "metrics", "sha256")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        self._saved_step = self.step
        if self.is_restored and self.value is not None and rank_zero_only.rank == 0:
            self._check()  # now, and not when the training has come to its end


def _trained(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


class TrainingPreview(L.Callback):
    """Logs what a training takes in memory and time, after its first ten steps.

    The first step, in which libraries set themselves up, does not count. Of Medusa-2 the steps in
    which both learn take longer: they are measured when they have begun.
    """

    def __init__(
        self,
        optimizer: str,
        has_average: bool,
        throughput: Throughput,
        settings: TrainConfig,
    ) -> None:
        self.throughput, self.settings = throughput, settings
        self.bytes_of_parameter = 4 + 4 + STATE_BYTES[optimizer] + 4 * has_average
        self._phases: list[tuple[int, int]] = []
        """First and last step of what is measured."""
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, module: MedusaModule) -> None:
        """See what steps there are, from where the training begins or resumes."""
        joint_step = module.joint.heads_only_steps if module.joint else 0
        edges = [trainer.global_step, max(trainer.global_step, joint_step), trainer.max_steps]
        phases = pairwise(edges)
        self._phases = [(start, end) for start, end in phases if end - start > PREVIEW_STEPS]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: MedusaModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock after the first step, and log after the tenth."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not trainer.is_global_zero:
            return
        for start, end in self._phases:
            steps = trainer.global_step - start
            if steps == 1:
                self._start = _now(module.device)
            elif steps == PREVIEW_STEPS:
                seconds = (_now(module.device) - self._start) / (PREVIEW_STEPS - 1)
                left = seconds * (trainer.max_steps - trainer.global_step)
                self.throughput.measure_rate(module.device, left)
                self._log(trainer, module, batch, seconds, end - trainer.global_step)

    def _log(
        self, trainer: L.Trainer, module: MedusaModule, batch: Batch, seconds: float, steps: int
    ) -> None:
        number = sum(p.numel() for p in module.parameters() if p.requires_grad)
        peak, memory = peak_memory_bytes(module.device), gpu_memory(module.device)
        log.info(
            "parameters trained: %.2f M, %s with gradients and optimizer; peak memory so far: %s%s",
            number / 1e6,
            decimal(number * self.bytes_of_parameter),
            decimal(peak),
            f" of {decimal(memory)}" if memory else "",
        )
        if memory and peak > _FULL * memory:
            log.warning(
                "memory is nearly full. Where it ends, %s", memory_of_training(self.settings)
            )
        tokens = trainer.accumulate_grad_batches * batch.input_ids_BT.numel()
        log.info(
            "a step (%s tokens with padding, %s labels of head 1) takes %.3g s: %s more%s, "
            "about %s",
            f"{tokens:,}",
            f"{batch.group_labels[1]:,}",
            seconds,
            f"{steps:,}",
            "" if trainer.global_step + steps == trainer.max_steps else " of the heads alone",
            _duration(steps * seconds),
        )
        if said := self.throughput.describe():
            rate = self.throughput.rate
            of_rate = "" if rate is None else f" (a matrix product: {rate / 1e12:.3g} TFLOP/s)"
            log.info("%s%s", said, of_rate)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _loss_of(trainer: L.Trainer) -> str:
    """Return the loss of the step that was just made, in words."""
    losses = [v for k, v in trainer.callback_metrics.items() if k.endswith("train/loss")]
    return f"loss {float(losses[0]):.3f}" if losses else ""


class StepProgress(L.Callback):
    """Counts optimizer steps in the first of several processes; see `runs/progress.py`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._open = ExitStack()
        self._bar: ProgressBar | None = None
        self._throughput: Throughput | None = None
        self._done, self._loss = 0, ""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._done = trainer.global_step
            bar = ProgressBar(self.what, trainer.max_steps, self._done)
            self._bar = self._open.enter_context(bar)
            found = (c for c in trainer.callbacks if isinstance(c, Throughput))
            self._throughput = next(found, None)

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any, **more: Any) -> None:
        if self._bar is not None and (made := trainer.global_step - self._done):
            is_logged = trainer.global_step % trainer.log_every_n_steps == 0
            if is_logged:  # then it is waited for anyhow
                self._loss = _loss_of(trainer)
            self._bar.advance(made, more=self._describe)
            self._done += made

    def _describe(self) -> str:
        speed = self._throughput.describe() if self._throughput else ""
        return ", ".join(filter(None, (self._loss, speed)))

    def on_train_end(self, *arguments: Any) -> None:
        """Show how far it came."""
        self._open.close()

    on_exception = on_train_end
