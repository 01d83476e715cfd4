"""Keeps the heads of the best validation, and stops where none has been better for long."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa_exp.errors import UserError
from medusa_exp.runs.files import publish

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
