"""One training step of the heads, for Lightning.

B batch, T time, D hidden, K heads, H the lm_head and the heads.

Medusa-2: the backbone's adapters and the heads learn together.

After Cai et al., "Medusa" (2024), section 2.2.2: L = L_LM + lambda_0 * L_heads (lambda_0 is
`train.coefficient`). From the beginning to the end of a run:

1. `setup.build_module` puts LoRA into the backbone's own layers, so that `backbone.hidden_states`
   is the adapted backbone's from then on (`model/adapters.py`).
2. The first `train.lora.heads_only_fraction` of the steps: hidden states without a gradient, the
   heads' loss alone, a learning rate of zero for the adapters; lest the gradients of heads that
   know nothing spoil the backbone.
3. The other steps: L. L_LM is cross entropy with the text, or, with
   `train.lora.self_distillation`, the divergence from the same backbone with its adapters off.
4. Each validation has the backbone answer the held-out prompts anew, for its answers change.
5. `setup.finish_joint` measures the backbone's held-out loss without and with adapters, writes
   `RUN_DIR/backbone`, and has the heads name that backbone as theirs.

B batch, T time, D hidden, K heads, H the lm_head and the heads.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.data.batching import labelled_index
from medusa_exp.data.datamodule import Batch
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, heads_input
from medusa_exp.model.loss import (
    DistributionTargets,
    Objective,
    Targets,
    TokenTargets,
    chunked_loss,
    medusa_counts,
    medusa_loss,
    medusa_losses,
)
from medusa_exp.train.acceptance import HeldOutResponse, accept_lengths
from medusa_exp.train.failures import check_loss
from medusa_exp.train.optimizer import build_optimizer, scheduled


class MedusaModule(L.LightningModule):
    """Heads on a frozen backbone: Medusa-1.

    The backbone is no submodule: it gets no gradient, is in no optimiser and in no checkpoint.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads,
        objective: Objective,
        *,
        answers: Callable[[], Sequence[HeldOutResponse]],
        val_tree_nodes: int,
        max_rank: int,
        optimizer: str,
        learning_rate: float,
        weight_decay: float,
        warmup_fraction: float,
        max_steps: int,
        made_with: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.objective = objective
        self.answers = answers
        self.val_tree_nodes = val_tree_nodes
        self.max_rank = min(max_rank, backbone.vocab_size)
        self.optimizer_name = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.max_steps = max_steps
        self.made_with = made_with
        self.last_metrics: dict[str, Any] = {}
        """Of the last step and of the last validation."""
        self.last_val_step = 0
        self._sums_H = torch.zeros(1 + heads.num_heads)
        self._totals: list[int] = []
        self._val_counts: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a micro-batch's part of its optimiser step's loss, a mean over all its labels."""
        place = batch_idx % self.trainer.accumulate_grad_batches
        if place == 0:
            self._totals = self._over_processes(torch.tensor(batch.group_labels)).tolist()
            self._sums_H = torch.zeros(1 + self.heads.num_heads, device=self.device)
        loss, sums_H = self.batch_loss(batch, self._totals)
        check_loss(loss, self.global_step, batch.numbers)
        self._sums_H += sums_H
        if place == self.trainer.accumulate_grad_batches - 1:
            self._log_step()
        # Lightning takes means over the micro-batches of a step, and over processes.
        return self.trainer.accumulate_grad_batches * self.trainer.world_size * loss

    def batch_loss(self, batch: Batch, totals: list[int]) -> tuple[Tensor, Tensor]:
        """Return what is minimised on a micro-batch, and sums of losses [1 + K], detached.

        The first of the sums is the lm_head's, which is not trained here: zero.

        Args:
            batch: the micro-batch.
            totals: labels of the lm_head and of each head that the loss is a mean over.
        """
        with torch.no_grad():
            hidden_BTD = self.hidden_states(batch)
        return self.heads_loss(batch, hidden_BTD, totals)

    def largest_loss(self, batch: Batch, totals: list[int]) -> tuple[Tensor, Tensor]:
        """Return `batch_loss` as it is in the steps that take most time and memory."""
        return self.batch_loss(batch, totals)

    def heads_loss(
        self, batch: Batch, hidden_BTD: Tensor, totals: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the heads' part of `batch_loss`."""
        losses = medusa_losses(
            self.heads,
            self._heads_input(batch, hidden_BTD),
            self.objective.targets(self.backbone, self.heads, hidden_BTD.detach(), batch),
            batch.is_trained_BT,
            batch.example_BT,
            batch.input_ids_BT,
            chunk_rows=self.objective.chunk_rows,
            form=self.objective.form,
        )
        loss = medusa_loss(losses, self.objective.decay, totals[1:])
        loss = self.objective.factor(self.global_step, self.max_steps) * loss
        sums = [loss.new_zeros(()), *(head.loss_sum.detach() for head in losses)]
        return loss, torch.stack(sums)

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._val_counts = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses, hits and labels: means come of sums over all batches, not of means."""
        hidden_BTD = self.hidden_states(batch)
        counts_K4 = medusa_counts(
            self.heads,
            self._heads_input(batch, hidden_BTD),
            self.objective.labels_of(self.backbone, hidden_BTD, batch),
            batch.is_trained_BT,
            batch.example_BT,
            batch.input_ids_BT,
            chunk_rows=self.objective.chunk_rows,
        )
        self._val_counts = counts_K4 if self._val_counts is None else self._val_counts + counts_K4

    def on_validation_epoch_end(self) -> None:
        """Log what the heads do on held-out text, and what they would be worth in decoding."""
        if self._val_counts is None:
            return
        found: dict[str, float] = {}
        loss_K, top1_K, top5_K, labels_K = self._val_counts.unbind(1)
        for name, sum_K in (("loss", loss_K), ("top1", top1_K), ("top5", top5_K)):
            mean_K = sum_K / labels_K.clamp(min=1)
            found |= {f"val/{name}_head{k}": float(x) for k, x in enumerate(mean_K, 1)}
        if answers := self.answers():
            found["val/accept_length"], found["val/accept_length_chain"] = accept_lengths(
                self.heads, answers, self.val_tree_nodes, self.max_rank
            )
        self.log_dict(found)
        self.last_metrics |= found
        self.last_val_step = self.global_step

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser of all head parameters, with warm-up and cosine by the step."""
        optimizer = build_optimizer(
            self.optimizer_name,
            self.heads,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            adapters=self.adapter_group(),
        )
        return scheduled(optimizer, self.warmup_fraction, self.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the checkpoint was made with (see `resume.py`), and what was measured."""
        checkpoint["made_with"] = self.made_with
        metrics = {name: float(value) for name, value in self.last_metrics.items()}
        checkpoint["measured"] = {"metrics": metrics, "val_step": self.last_val_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what was measured: there may be no step left to measure."""
        measured = checkpoint["measured"]
        self.last_metrics, self.last_val_step = measured["metrics"], measured["val_step"]

    def adapter_group(self) -> dict[str, Any] | None:
        """Return the optimiser's group of what is trained besides the heads: nothing."""
        return None

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return hidden_BTD of a batch, read or computed."""
        if batch.hidden_BTD is not None:
            return batch.hidden_BTD
        return self.backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)

    def _heads_input(self, batch: Batch, hidden_BTD: Tensor) -> Tensor:
        example_BT = None if batch.positions_BT is None else batch.example_BT  # one a row
        return heads_input(self.heads.prefix, hidden_BTD.float(), example_BT)

    def _over_processes(self, counts_K: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return counts_K
        return self.trainer.strategy.reduce(counts_K.to(self.device), reduce_op="sum")

    def _log_step(self) -> None:
        """Log the step's loss: the mean over the labels of all its micro-batches and processes."""
        sums_H = self._over_processes(self._sums_H)
        mean_H = sums_H / torch.tensor(self._totals, device=sums_H.device).clamp(min=1)
        self.log_means(mean_H[0], mean_H[1:])

    def log_means(self, backbone: Tensor, mean_K: Tensor) -> None:
        """Log the step's mean losses, of the lm_head and of each head."""
        weight_K = self.objective.decay ** torch.arange(1, len(mean_K) + 1, device=mean_K.device)
        found = {"train/loss": (weight_K * mean_K).sum()}
        found |= {f"train/loss_head{k}": mean for k, mean in enumerate(mean_K, 1)}
        self.log("train/loss", found["train/loss"], prog_bar=True)
        self.log_dict({name: value for name, value in found.items() if name != "train/loss"})
        self.last_metrics |= found  # as tensors: reading them would wait for the device


class JointModule(MedusaModule):
    """Heads on a backbone with adapters. Checkpoints hold what is trained, and nothing frozen."""

    strict_loading = False

    def __init__(
        self,
        *arguments: Any,
        adapted: PreTrainedModel,
        adapter_learning_rate: float,
        heads_only_steps: int,
        self_distillation: bool,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.adapted = adapted.train()
        self.adapter_learning_rate = adapter_learning_rate
        self.heads_only_steps = heads_only_steps
        self.self_distillation = self_distillation

    def batch_loss(self, batch: Batch, totals: list[int]) -> tuple[Tensor, Tensor]:
        """Return the joint loss of a micro-batch, or the heads' alone at first."""
        return self._loss(batch, totals, is_joint=self.global_step >= self.heads_only_steps)

    def largest_loss(self, batch: Batch, totals: list[int]) -> tuple[Tensor, Tensor]:
        """Return the joint loss, at whatever step."""
        return self._loss(batch, totals, is_joint=self.heads_only_steps < self.max_steps)

    def _loss(self, batch: Batch, totals: list[int], is_joint: bool) -> tuple[Tensor, Tensor]:
        with nullcontext() if is_joint else torch.no_grad():
            hidden_BTD = self.hidden_states(batch)
        loss, sums_H = self.heads_loss(batch, hidden_BTD, totals)
        if is_joint:
            lm_sum = self._lm_loss(batch, hidden_BTD)
            loss = loss + lm_sum / max(totals[0], 1)
            sums_H[0] = lm_sum.detach()
        return loss, sums_H

    def log_means(self, backbone: Tensor, mean_K: Tensor) -> None:
        """Log the backbone's own loss too, once it learns."""
        super().log_means(backbone, mean_K)
        if self.global_step >= self.heads_only_steps:
            self.log("train/loss_backbone", backbone)
            self.last_metrics["train/loss_backbone"] = backbone

    def adapter_parameters(self) -> list[Tensor]:
        """Return what of the backbone is trained."""
        return [p for p in self.adapted.parameters() if p.requires_grad]

    def adapter_group(self) -> dict[str, Any] | None:
        """Return the optimiser's group of the adapters, which wait for the heads."""
        return {
            "params": self.adapter_parameters(),
            "lr": self.adapter_learning_rate,
            "weight_decay": 0.0,
            "waits": self.heads_only_steps,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen."""
        super().on_save_checkpoint(checkpoint)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value
            for name, value in state.items()
            if name in trained or name.startswith("heads.")
        }

    def _lm_loss(self, batch: Batch, hidden_BTD: Tensor) -> Tensor:
        """Return the backbone's own loss on the trained tokens, summed."""
        index_R = labelled_index(batch.is_trained_BT, batch.example_BT, 0)
        targets = self._lm_targets(batch)
        return chunked_loss(
            self.backbone.next_logits,
            targets,
            (hidden_BTD.flatten(0, 1)[index_R],),
            targets.at(index_R),
            self.objective.chunk_rows,
        )

    def _lm_targets(self, batch: Batch) -> Targets:
        if not self.self_distillation:
            return TokenTargets(batch.input_ids_BT)
        self.adapted.eval()  # a teacher does not drop out
        with torch.no_grad(), self.adapted.disable_adapter():
            teacher_BTD = self.hidden_states(batch)
        self.adapted.train()
        return DistributionTargets(teacher_BTD, self.backbone.next_logits)
