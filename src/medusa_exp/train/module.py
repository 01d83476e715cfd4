"""One training step of the heads, for Lightning.

B batch, T time, D hidden, K heads.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from medusa_exp.data.batches import Batch
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.loss import HeadLoss, medusa_hits, medusa_losses, weighted_mean
from medusa_exp.train.schedule import warmup_cosine


class MedusaModule(L.LightningModule):
    """Heads on a frozen backbone: Medusa-1.

    The backbone is no submodule: it gets no gradient, is in no optimiser and in no checkpoint.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads,
        *,
        learning_rate: float,
        weight_decay: float,
        warmup_fraction: float,
        max_steps: int,
        decay: float,
        loss_chunk_rows: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.max_steps = max_steps
        self.decay = decay
        self.loss_chunk_rows = loss_chunk_rows
        self.last_train_metrics: dict[str, float] = {}
        self._val_sums: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted loss of all heads on one batch."""
        losses = medusa_losses(self.heads, *self._inputs(batch), chunk_rows=self.loss_chunk_rows)
        loss = weighted_mean(losses, self.decay)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower train.learning_rate, "
                "or try dtype=fp32. The newest checkpoint is from before."
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/loss_head{k}": _mean(head) for k, head in enumerate(losses, 1)})
        return loss

    def on_train_end(self) -> None:
        """Keep the last step's numbers: a validation that follows clears Lightning's."""
        logged = self.trainer.logged_metrics
        self.last_train_metrics = {k: float(v) for k, v in logged.items() if "train/" in k}

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._val_sums = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses, hits and labels: means come of sums over all batches, not of means."""
        losses = medusa_hits(self.heads, *self._inputs(batch), chunk_rows=self.loss_chunk_rows)
        sums = torch.stack([_counts(head) for head in losses])
        self._val_sums = sums if self._val_sums is None else self._val_sums + sums

    def on_validation_epoch_end(self) -> None:
        """Log what the heads do on held-out text."""
        if self._val_sums is None:
            return
        loss_K, top1_K, top5_K, labels_K = self._val_sums.unbind(1)
        for name, sum_K in (("loss", loss_K), ("top1", top1_K), ("top5", top5_K)):
            mean_K = sum_K / labels_K.clamp(min=1)
            self.log_dict({f"val/{name}_head{k}": float(x) for k, x in enumerate(mean_K, 1)})

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on all head parameters, with warm-up and cosine by the step."""
        optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = warmup_cosine(optimizer, self.warmup_fraction, self.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            hidden_BTD = self.backbone.hidden_states(batch.input_ids_BT).float()
        return hidden_BTD, batch.input_ids_BT, batch.is_trained_BT


def _mean(head: HeadLoss) -> Tensor:
    return head.loss_sum.detach() / max(head.num_labels, 1)


def _counts(head: HeadLoss) -> Tensor:
    assert head.top1_sum is not None and head.top5_sum is not None
    labels = torch.tensor(head.num_labels, device=head.loss_sum.device)
    values = (head.loss_sum, head.top1_sum, head.top5_sum, labels)
    return torch.stack([value.double() for value in values])
