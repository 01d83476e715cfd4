"""A moving average of the heads, which is validated and kept in their place."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class AverageHeads(L.Callback):
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
