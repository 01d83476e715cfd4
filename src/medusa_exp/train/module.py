"""One training step of the heads, for Lightning.

B batch, T time, D hidden, K heads.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from medusa_exp.data.loader import Batch
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.loss import HeadLoss, medusa_counts, medusa_loss, medusa_losses
from medusa_exp.train.schedule import scheduled

_CHOICE_ROWS = 1024
"""Rows whose logits of the backbone exist at one time."""


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
        labels: str,
        made_with: str,
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
        self.labels = labels
        self.made_with = made_with
        self.last_train_metrics: dict[str, float] = {}
        self._val_counts: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted loss of all heads on one batch."""
        losses = medusa_losses(self.heads, *self._inputs(batch), chunk_rows=self.loss_chunk_rows)
        loss = medusa_loss(losses, self.decay)
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
        self._val_counts = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses, hits and labels: means come of sums over all batches, not of means."""
        counts_K4 = medusa_counts(self.heads, *self._inputs(batch), chunk_rows=self.loss_chunk_rows)
        self._val_counts = counts_K4 if self._val_counts is None else self._val_counts + counts_K4

    def on_validation_epoch_end(self) -> None:
        """Log what the heads do on held-out text."""
        if self._val_counts is None:
            return
        loss_K, top1_K, top5_K, labels_K = self._val_counts.unbind(1)
        for name, sum_K in (("loss", loss_K), ("top1", top1_K), ("top5", top5_K)):
            mean_K = sum_K / labels_K.clamp(min=1)
            self.log_dict({f"val/{name}_head{k}": float(x) for k, x in enumerate(mean_K, 1)})

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on all head parameters, with warm-up and cosine by the step."""
        optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        return scheduled(optimizer, self.warmup_fraction, self.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the checkpoint was made with: see `stage.checkpoint_to_resume`."""
        checkpoint["made_with"] = self.made_with

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden_BTD, labels_BT, is_trained_BT and documents_BT of a batch."""
        with torch.no_grad():
            hidden_BTD = self.backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)
            labels_BT = batch.input_ids_BT
            if self.labels == "own":
                labels_BT = own_choices(self.backbone, hidden_BTD, batch)
        return hidden_BTD.float(), labels_BT, batch.is_trained_BT, batch.documents_BT


def own_choices(backbone: Backbone, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return in place of each trained token [B, T] what the backbone says there, the likeliest one.

    Decoding compares guesses with this, not with the data: where a text takes a turn that the
    backbone would not take, its token is noise to the heads.
    """
    follows_BT = batch.documents_BT[:, 1:] == batch.documents_BT[:, :-1]
    is_chosen_BT = batch.is_trained_BT[:, 1:] & follows_BT
    rows = hidden_BTD[:, :-1][is_chosen_BT].split(_CHOICE_ROWS)
    labels_BT = batch.input_ids_BT.clone()
    if is_chosen_BT.any():
        choices_R = torch.cat([backbone.lm_head(rows_CD).argmax(-1) for rows_CD in rows])
        labels_BT[:, 1:][is_chosen_BT] = choices_R
    return labels_BT


def _mean(head: HeadLoss) -> Tensor:
    return head.loss_sum.detach() / max(head.num_labels, 1)
