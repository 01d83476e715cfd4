"""LightningModule of the heads: a training step, a validation, and the joint loss of Medusa-2.

Medusa-1 trains heads on a frozen backbone. In Medusa-2 adapters of the backbone learn with them,
after Cai et al., "Medusa" (2024), section 2.2.2: L = L_LM + lambda_0 * L_heads (lambda_0 is
`train.coefficient`). From the beginning to the end of a run of Medusa-2:

1. `stages/train.py` puts LoRA into the backbone's own layers, so that `backbone.hidden_states` is
   the adapted backbone's from then on (`model/adapters.py`).
2. The first `train.lora.heads_only_fraction` of the steps: hidden states without a gradient, the
   heads' loss alone, a learning rate of zero for the adapters; lest the gradients of heads that
   know nothing spoil the backbone.
3. The other steps: L. L_LM is cross entropy with the text, or, with
   `train.lora.self_distillation`, the divergence from the same backbone with its adapters off.
4. Each validation has the backbone answer the held-out prompts anew, for its responses change.
5. `stages/train.py` measures the backbone's held-out loss without and with adapters, writes
   `RUN_DIR/backbone`, and has the heads name that backbone as theirs.

B batch, T time, D hidden, K heads, H the lm_head and the heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.config import LoraSettings, TrainConfig
from medusa_exp.data.datamodule import Batch, send
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.model.attention import few_shapes
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, heads_input
from medusa_exp.model.loss import (
    Objective,
    acceptance_weights,
    at_least_one,
    decay_weights,
    loss_and_acceptance,
    medusa_counts,
    medusa_loss,
    medusa_losses,
)
from medusa_exp.model.row_loss import Divergence
from medusa_exp.model.targets import Targets, TeacherTargets, TokenTargets
from medusa_exp.train.acceptance import HeldOutResponse, accept_lengths
from medusa_exp.train.defaults import compiled_backbone, settled_of
from medusa_exp.train.failures import check_losses
from medusa_exp.train.optimizer import build_optimizer, scheduled

_STEP_SHARE = 0.05
"""Of a step, in the running mean of acceptance: some twenty steps count."""


@dataclass(frozen=True)
class JointLoss:
    """What Medusa-2 trains besides the heads."""

    adapted: PreTrainedModel
    """The backbone's model with adapters in it, which are all that is trained of it."""
    settings: LoraSettings
    heads_only_steps: int
    """Steps at the beginning in which the heads learn alone."""

    def optimizer_group(self) -> dict[str, Any]:
        """Return the optimizer's group of the adapters, which wait for the heads."""
        return {
            "params": [p for p in self.adapted.parameters() if p.requires_grad],
            "lr": self.settings.learning_rate,
            "weight_decay": 0.0,
            "waits": self.heads_only_steps,
        }

    def backbone_loss(
        self, backbone: Backbone, batch: Batch, hidden_BTD: Tensor, chunk_rows: int
    ) -> Tensor:
        """Return the backbone's own loss on the trained tokens, summed, in nats."""
        index_R = batch.labeled[0]
        targets = self._targets(backbone, batch)
        inputs = (hidden_BTD.flatten(0, 1)[index_R],)
        wanted, logits_of = targets.at(index_R), backbone.next_logits
        return loss_and_acceptance(logits_of, targets, inputs, wanted, chunk_rows)[0]

    def _targets(self, backbone: Backbone, batch: Batch) -> Targets:
        if not self.settings.self_distillation:
            return TokenTargets(batch.input_ids_BT)
        self.adapted.eval()  # a teacher does not drop out
        with torch.no_grad(), few_shapes(), self.adapted.disable_adapter():
            teacher_BTD = backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)
        self.adapted.train()

        def probabilities(hidden_RD: Tensor) -> Tensor:
            return backbone.next_logits(hidden_RD).softmax(-1, torch.float32)

        return TeacherTargets(teacher_BTD, probabilities, Divergence())


class MedusaModule(L.LightningModule):
    """Heads on a backbone: Medusa-1, or with `joint` Medusa-2.

    The backbone is no submodule: what is frozen gets no gradient, and is in no optimizer and in no
    checkpoint.

    Args:
        backbone: that the heads read.
        heads: to train.
        settings: the section `train` of the config.
        max_steps: optimizer steps of the whole training.
        responses: gives the backbone's responses to held-out prompts, at each validation.
        max_rank: draft tokens of a head that val/accept_length considers.
        rule: by which the responses were made, and drafts of them are accepted.
        key: `training_key` of the training, for its checkpoints.
        former_key: what its key was in earlier versions, if it was another.
        made_of: what the key is made of.
        joint: of Medusa-2.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads,
        settings: TrainConfig,
        *,
        max_steps: int,
        responses: Callable[[], Sequence[HeldOutResponse]],
        max_rank: int,
        rule: AcceptanceRule = GREEDY,
        key: str,
        former_key: str | None = None,
        made_of: dict[str, Any] | None = None,
        joint: JointLoss | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.heads, self.settings = backbone, heads, settings
        self.objective = Objective.of(settings)
        self.max_steps, self.responses = max_steps, responses
        self.key, self.former_key, self.made_of = key, former_key or key, made_of or {}
        self.max_rank, self.rule = min(max_rank, heads.config.head_vocab_size), rule
        self.joint = joint
        if joint is not None:
            self.adapted = joint.adapted.train()
            self.strict_loading = False  # checkpoints have nothing that is frozen
        self.last_metrics: dict[str, Any] = {}
        """Metrics of the last step and of the last validation."""
        self.last_val_step = 0
        self._sums: Tensor = self._no_sums()
        self._totals: Sequence[int | Tensor] = []
        self._losses: list[tuple[Tensor, list[int]]] = []
        """Of the running step: each micro-batch's loss, and the numbers of its examples."""
        self._step_metrics: dict[str, Tensor] = {}
        self._step_reached_K: Tensor | None = None
        self._reached_K: Tensor | None = None
        """Running mean over the steps, where acceptance is measured: see `HeadLoss.reached_sum`."""
        self._val_counts: Tensor | None = None

    @contextmanager
    def compiled(self, autocast: torch.dtype | None) -> Iterator[bool]:
        """Have torch compile the loss, and the backbone's layers where a step runs them.

        For as long as this lasts. Where torch cannot, they run as they are, and a line says why.

        Args:
            autocast: the dtype of training's autocast, if it has any.

        Yields:
            Are the layers compiled?
        """
        plain, runs_layers = self.objective, self.settings.features == "online"
        self.objective = replace(plain, is_compiled=True)
        try:
            with (
                compiled_backbone(self.backbone, autocast) if runs_layers else nullcontext(False)
            ) as is_compiled:
                yield is_compiled
        finally:
            self.objective = plain

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a micro-batch's part of its optimizer step's loss, a mean over all its labels.

        Nothing here waits for the device, which is given the next work while it still has some.
        """
        place = batch_idx % self.trainer.accumulate_grad_batches
        if place == 0:
            self._totals = self._step_totals(batch.group_labels)
            self._sums = self._no_sums()
            self._losses = []
        loss, sums = self.batch_loss(batch, self._totals)
        self._losses.append((loss.detach(), batch.numbers))
        self._sums += sums
        if place == self.trainer.accumulate_grad_batches - 1:
            self._log_step()
        # Lightning takes means over the micro-batches of a step, and over processes.
        return self.trainer.accumulate_grad_batches * self.trainer.world_size * loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Look at the losses of a step's micro-batches once, before they change anything.

        Raises:
            BadLoss: one of them is NaN or infinite.
        """
        check_losses(self._losses, self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Take over what was measured, where a step is made."""
        self.last_metrics |= self._step_metrics
        self._step_metrics = {}
        if self._step_reached_K is not None:
            before_K = self._step_reached_K if self._reached_K is None else self._reached_K
            self._reached_K = before_K.to(self.device).lerp(self._step_reached_K, _STEP_SHARE)
            self._step_reached_K = None

    def batch_loss(self, batch: Batch, totals: Sequence[int | Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is minimized on a micro-batch, and sums of losses [1 + K], detached.

        The first of the sums is the lm_head's, zero where it is not trained. Where acceptance is
        measured, K `HeadLoss.reached_sum` follow. `totals` counts the labels of the lm_head and of
        each head that the loss is a mean over.
        """
        is_joint = self.is_joint()
        with nullcontext() if is_joint else torch.no_grad():
            hidden_BTD = self.hidden_states(batch)
        losses = medusa_losses(
            self.heads,
            self._heads_input(batch, hidden_BTD),
            self.objective.targets(self.backbone, self.heads, hidden_BTD.detach(), batch),
            batch.labeled,
            batch.input_ids_BT,
            chunk_rows=self.objective.loss_chunk_rows,
            any_labeled=batch.any_labeled,
            form=self.objective.loss_form,
            sees_own_drafts=self.sees_own_drafts(),
            measures_acceptance=self.objective.measures_acceptance,
        )
        loss = medusa_loss(losses, self.head_weights(), totals[1:])
        loss = self.objective.factor(self.global_step, self.max_steps) * loss
        backbone_sum = loss.new_zeros(())
        if is_joint:
            assert self.joint is not None
            rows = self.objective.loss_chunk_rows
            backbone_sum = self.joint.backbone_loss(self.backbone, batch, hidden_BTD, rows)
            loss = loss + backbone_sum / at_least_one(totals[0])
        sums = [backbone_sum.detach(), *(head.loss_sum.detach() for head in losses)]
        sums += [head.reached_sum for head in losses if head.reached_sum is not None]
        return loss, torch.stack(sums)

    def head_weights(self) -> Sequence[float | Tensor]:
        """Return the weights of the heads' losses at this step.

        By acceptance they are those of the steps before, the same for all micro-batches; at the
        first step, of which nothing is known, they are powers of the decay.
        """
        if self.objective.head_weights == "decay" or self._reached_K is None:
            return decay_weights(self.objective.decay, self.heads.num_heads)
        reached_K = self._reached_K.to(self.device)
        return acceptance_weights(reached_K, self.objective.decay).unbind()

    def is_joint(self) -> bool:
        """Say whether the backbone learns too, at this step."""
        return self.joint is not None and self.global_step >= self.joint.heads_only_steps

    def sees_own_drafts(self) -> bool:
        """Say whether heads see what they draft themselves, in place of the text, at this step."""
        start = self.settings.own_drafts_from
        return start is not None and self.global_step >= start * self.max_steps

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return hidden_BTD of a batch, read or computed."""
        if batch.hidden_BTD is not None:
            return batch.hidden_BTD
        with few_shapes():
            return self.backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)

    def _heads_input(self, batch: Batch, hidden_BTD: Tensor) -> Tensor:
        example_BT = None if batch.positions_BT is None else batch.example_BT  # one a row
        return heads_input(self.heads.prefix, hidden_BTD.float(), example_BT)

    def _step_totals(self, labels: list[int]) -> Sequence[int | Tensor]:
        """Return the labels [1 + K] of a step in all processes; of several, on the device."""
        if self.trainer.world_size == 1:
            return labels
        return self._over_processes(send(torch.tensor(labels), self.device)).unbind()

    def _over_processes(self, values_H: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return values_H
        return self.trainer.strategy.reduce(values_H, reduce_op="sum")

    def _log_step(self) -> None:
        """Log the step's loss: the mean over the labels of all its micro-batches and processes."""
        number = 1 + self.heads.num_heads
        sums = self._over_processes(self._sums)
        totals = self._totals
        totals_H = torch.stack(totals) if isinstance(totals, tuple) else torch.tensor(totals)
        totals_H = send(totals_H, sums.device).clamp(min=1)
        mean_H = sums[:number] / totals_H
        mean_K = mean_H[1:]
        found = {f"train/loss_head{k}": mean for k, mean in enumerate(mean_K, 1)}
        if self.objective.measures_acceptance:
            self._step_reached_K = sums[number:] / totals_H[1:]
            found |= {f"train/accepted_head{k}": x for k, x in enumerate(self._step_reached_K, 1)}
        if self.is_joint():
            found["train/loss_backbone"] = mean_H[0]
        loss = (self._weights_of_metric(mean_K.device) * mean_K).sum()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(found)
        # As tensors: reading them would wait for the device.
        self._step_metrics = {"train/loss": loss, **found}

    def _weights_of_metric(self, device: torch.device) -> Tensor:
        weights = self.head_weights()
        if isinstance(weights, tuple):
            return torch.stack(weights)
        return self.objective.decay ** torch.arange(1, len(weights) + 1, device=device)

    def _no_sums(self) -> Tensor:
        sums_of_head = 2 if self.objective.measures_acceptance else 1
        return torch.zeros(1 + sums_of_head * self.heads.num_heads, device=self.device)

    def on_validation_epoch_start(self) -> None:
        self._val_counts = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count losses, hits and labels: means come of sums over all batches, not of means."""
        hidden_BTD = self.hidden_states(batch)
        counts_K4 = medusa_counts(
            self.heads,
            self._heads_input(batch, hidden_BTD),
            self.objective.labels_of(self.backbone, hidden_BTD, batch),
            batch.labeled,
            batch.input_ids_BT,
            chunk_rows=self.objective.loss_chunk_rows,
            any_labeled=batch.any_labeled,
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
        if responses := self.responses():
            found["val/accept_length"], found["val/accept_length_chain"] = accept_lengths(
                self.heads,
                responses,
                self.settings.val_tree_nodes,
                self.max_rank,
                self.rule,
                self.backbone,
            )
        self.log_dict(found)
        self.last_metrics |= found
        self.last_val_step = self.global_step

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer of all that is trained, with warm-up and cosine by the step."""
        assert self.settings.learning_rate is not None  # settled
        optimizer = build_optimizer(
            self.settings.optimizer,
            self.heads,
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            adapters=self.joint.optimizer_group() if self.joint else None,
            is_fused=self.is_fused,
        )
        return scheduled(optimizer, self.settings.warmup_fraction, self.max_steps)

    @property
    def is_fused(self) -> bool:
        """Is the optimizer one kernel? On a GPU, where nobody scales gradients as for float16."""
        return self.device.type == "cuda" and self.trainer.precision != "16-mixed"

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by norm, as Lightning does, which takes a fused optimizer for one that unscales."""
        if gradient_clip_val and self.is_fused:
            clipped = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(clipped, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen; say what the checkpoint was made with, and what was measured.

        `made_with`, `made_of` and `settled` are read by `checkpointing`.
        """
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {
            n: v for n, v in state if n in trained or n.startswith("heads.")
        }
        checkpoint["made_with"], checkpoint["made_of"] = self.key, self.made_of
        checkpoint["settled"] = settled_of(self.settings)
        metrics = {name: float(value) for name, value in self.last_metrics.items()}
        checkpoint["measured"] = {"metrics": metrics, "val_step": self.last_val_step}
        if self._reached_K is not None:
            checkpoint["acceptance"] = self._reached_K.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what was measured: there may be no step left to measure."""
        measured = checkpoint["measured"]
        self.last_metrics, self.last_val_step = measured["metrics"], measured["val_step"]
        self._reached_K = checkpoint.get("acceptance")
