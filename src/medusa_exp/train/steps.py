"""The progress of a training where there is no terminal to draw Lightning's bar on."""

from contextlib import ExitStack
from typing import Any

import lightning as L
from rich.progress import Progress, TaskID

from medusa_exp.runs.progress import progress_bar


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
