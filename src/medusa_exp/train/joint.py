"""Medusa-2: the backbone's adapters and the heads learn together.

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

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.data.datamodule import Batch
from medusa_exp.data.labels import labelled_index
from medusa_exp.model.chunks import chunked_loss
from medusa_exp.model.targets import DistributionTargets, Targets, TokenTargets
from medusa_exp.train.module import MedusaModule


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
        index_R = labelled_index(batch.is_trained_BT, batch.documents_BT, 0)
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
