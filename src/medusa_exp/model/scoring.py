"""How well heads or a model predict given text: ranks of the tokens, loss and first choices.

P positions of a response, D hidden, K heads, C positions of a chunk, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from medusa_exp.data.examples import Example
from medusa_exp.model.argmax import argmax
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.loss import head_labels
from medusa_exp.model.teacher_forcing import teacher_forced
from medusa_exp.runs.progress import track

CHUNK = 256
"""Positions whose logits exist at one time."""


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
        num_hits += int((argmax(logits_RV) == labels_R).sum())
        num_tokens += len(labels_R)
    number = max(1, num_tokens)
    return Agreement(loss_sum / number, num_hits / number, num_tokens)


@torch.no_grad()
def answer_ranks(
    heads: MedusaHeads, tokens_P: Tensor, hidden_PD: Tensor, max_rank: int
) -> np.ndarray:
    """Return ranks_PK: where token t of a response is certain, the rank of token t+k to head k.

    What is not among a head's `max_rank` likeliest tokens, or stands beyond the response's end, has
    rank `max_rank`.

    Args:
        heads: of any family; those that see tokens see the response's own.
        tokens_P: the response.
        hidden_PD: the states from which the backbone chose each token.
        max_rank: how many draft tokens of a head count.
    """
    labels_P = heads.to_head_vocab(tokens_P)
    ranks_PK = torch.full((len(labels_P), heads.num_heads), max_rank)
    place_P = torch.arange(len(labels_P), device=labels_P.device)
    rank_R = torch.arange(max_rank, device=labels_P.device)
    used = range(min(heads.num_heads, len(labels_P) - 1))
    of_heads = teacher_forced(
        heads,
        hidden_PD[None].to(heads.dtype),
        pad(tokens_P, (1, 0))[None],  # in a text the token chosen from a state follows it
        [place_P, *(place_P[: -k - 1] for k in used)],
        place_P[:-1],
        chunk_rows=CHUNK,
    )
    for k, inputs in enumerate(of_heads):
        truth_P = labels_P[k + 1 :]
        chunks = [part.split(CHUNK) for part in (truth_P, *inputs.rows)]
        found = []
        for truth_C, *inputs_C in zip(*chunks, strict=True):
            draft_CR = inputs.logits_of(*inputs_C).topk(max_rank).indices
            is_true_CR = draft_CR == truth_C[:, None]
            found.append(torch.where(is_true_CR, rank_R, max_rank).amin(-1))
        ranks_PK[: len(truth_P), k] = torch.cat(found).cpu()
    return ranks_PK.numpy()
