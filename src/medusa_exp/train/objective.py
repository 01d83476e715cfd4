"""What heads are trained to say, and how much it counts: hidden states in, targets and weights out.

B batch, T time, D hidden, V vocabulary, R rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.data.datamodule import Batch
from medusa_exp.data.labels import is_labelled, labelled_index
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.targets import (
    DistributionTargets,
    Targets,
    TokenTargets,
    TopTargets,
    first_choices,
)


@dataclass(frozen=True)
class Objective:
    """The keys of `train` that say what is minimised; see there."""

    loss: str = "ce"
    labels: str = "own"
    top_k: int = 16
    decay: float = 0.8
    coefficient: float = 1.0
    coefficient_schedule: str = "constant"
    chunk_rows: int = 256
    form: str = "recompute"

    def labels_of(self, backbone: Backbone, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """Return [B, T], at each trained place, the token that heads are to say there."""
        if self.labels == "own":
            if batch.own_BT is not None:
                return batch.own_BT
            return own_choices(backbone, hidden_BTD, batch)
        return batch.input_ids_BT

    def targets(
        self, backbone: Backbone, heads: MedusaHeads, hidden_BTD: Tensor, batch: Batch
    ) -> Targets:
        """Return what the heads are to say on a batch."""
        if self.loss == "ce":
            return TokenTargets(heads.words_of(self.labels_of(backbone, hidden_BTD, batch)))

        def next_logits(hidden_RD: Tensor) -> Tensor:
            return heads.of_words(backbone.next_logits(hidden_RD))

        if self.loss == "kl":
            return DistributionTargets(hidden_BTD, next_logits)
        is_wanted_BT = is_labelled(batch.is_trained_BT, batch.documents_BT, 0)
        return TopTargets(hidden_BTD, is_wanted_BT, next_logits, self.top_k)

    def factor(self, step: int, max_steps: int) -> float:
        """Return what the heads' loss is multiplied by at an optimiser step (from 0)."""
        progress = min(1.0, (step + 1) / max_steps)
        share = {
            "constant": 1.0,
            "linear": progress,
            "sine": math.sin(0.5 * math.pi * progress),
        }[self.coefficient_schedule]
        return self.coefficient * share


@torch.no_grad()
def own_choices(backbone: Backbone, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return in place of each trained token [B, T] what the backbone says there, the likeliest one.

    Decoding compares guesses with this, not with the data: where a text takes a turn that the
    backbone would not take, its token is noise to the heads.
    """
    index_R = labelled_index(batch.is_trained_BT, batch.documents_BT, 0)
    hidden_RD = hidden_BTD.flatten(0, 1)[index_R]
    labels = batch.input_ids_BT.flatten().clone()
    labels[index_R + 1] = first_choices(backbone.next_logits, hidden_RD)
    return labels.view_as(batch.input_ids_BT)
