"""How near a model's own words are to given ones: its loss and its first choices on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from medusa_exp.data.examples import Example
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loss import head_labels
from medusa_exp.runs.progress import track


@dataclass(frozen=True)
class Agreement:
    """Means over the trained tokens of some documents."""

    nats_per_token: float
    """Cross entropy of the model on them."""
    top1: float
    """Share of them that are the model's own first choice."""
    num_tokens: int


@torch.inference_mode()
def measure_agreement(backbone: Backbone, examples: Sequence[Example], what: str) -> Agreement:
    """Run documents through the model, one after the other, under a progress bar named `what`."""
    loss_sum, num_hits, num_tokens = 0.0, 0, 0
    for example in track(examples, what):
        ids_1T = torch.tensor(example.input_ids, device=backbone.device).long()[None]
        is_trained_1T = torch.tensor(example.is_trained, device=backbone.device)[None]
        # The lm_head is head 0: at t it predicts t+1.
        one_1T = torch.ones_like(ids_1T)
        index_R, labels_R = head_labels(ids_1T, is_trained_1T, one_1T, 0)
        logits_RV = backbone.model(input_ids=ids_1T, use_cache=False).logits[0, index_R].float()
        loss_sum += float(cross_entropy(logits_RV, labels_R, reduction="sum"))
        num_hits += int((logits_RV.argmax(-1) == labels_R).sum())
        num_tokens += len(labels_R)
    number = max(1, num_tokens)
    return Agreement(loss_sum / number, num_hits / number, num_tokens)
