"""The Medusa-1 loss, without ever holding the logits of all heads.

B batch, T time, D hidden, V vocabulary, K heads, R labelled rows of one head, C rows of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from medusa_exp.data.labels import is_labelled
from medusa_exp.model.chunks import chunked_loss
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.targets import Targets


@dataclass
class HeadLoss:
    """One head's loss on one batch, summed over its R labelled positions."""

    loss_sum: Tensor
    num_labels: int


def head_labels(
    input_ids_BT: Tensor, is_trained_BT: Tensor, documents_BT: Tensor, head: int
) -> tuple[Tensor, Tensor]:
    """Return (is_labelled_BT, labels_R) of head k: its label at t is token t+1+k."""
    is_labelled_BT = is_labelled(is_trained_BT, documents_BT, head)
    index_R = is_labelled_BT.flatten().nonzero()[:, 0]
    return is_labelled_BT, input_ids_BT.flatten()[index_R + 1 + head]


def medusa_losses(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    targets: Targets,
    is_trained_BT: Tensor,
    documents_BT: Tensor,
    input_ids_BT: Tensor,
    *,
    chunk_rows: int,
    form: str = "recompute",
) -> list[HeadLoss]:
    """Compute every head's loss, summed, in nats.

    Only labelled rows are projected, and at most `chunk_rows` x V logits exist at once; `form` is
    of `train.loss_form`, see `chunks.py`.
    """
    results = []
    for k in range(heads.num_heads):
        is_labelled_BT = is_labelled(is_trained_BT, documents_BT, k + 1)
        index_R = is_labelled_BT.flatten().nonzero()[:, 0]
        inputs = head_inputs(heads, k, index_R, hidden_BTD, input_ids_BT)
        # Head k is to say at t what is to be said after token t+k.
        wanted = targets.at(index_R + k + 1)
        logits_of = partial(heads.head_logits, k)
        parameters = heads.head_parameters(k) if form == "at_once" else ()
        loss_sum = chunked_loss(logits_of, targets, inputs, wanted, chunk_rows, parameters)
        results.append(HeadLoss(loss_sum, len(index_R)))
    return results


def head_inputs(
    heads: MedusaHeads, k: int, index_R: Tensor, hidden_BTD: Tensor, input_ids_BT: Tensor
) -> tuple[Tensor, ...]:
    """Return the arguments of `head_logits` behind k, at these flat positions.

    Sequential heads see the text's own tokens as if they had been drafted.
    """
    hidden_RD = hidden_BTD.flatten(0, 1)[index_R]
    if not heads.is_sequential:
        return (hidden_RD,)
    next_J = torch.arange(1, k + 2, device=index_R.device)
    return hidden_RD, input_ids_BT.flatten()[index_R[:, None] + next_J]


def medusa_loss(
    losses: list[HeadLoss], decay: float, totals: Sequence[int] | None = None
) -> Tensor:
    """Return sum over heads k of decay**k times the head's mean loss (Medusa, equation 1).

    Args:
        losses: of the heads on a batch.
        decay: lambda_k is its k-th power.
        totals: what each head's sum is divided by, where this batch is a part of a larger one; by
            default its own labels. A head without a label contributes zero, not NaN.
    """
    if totals is None:
        totals = [loss.num_labels for loss in losses]
    terms = [
        decay**k * loss.loss_sum / max(total, 1)
        for k, (loss, total) in enumerate(zip(losses, totals, strict=True), 1)
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def medusa_counts(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    is_trained_BT: Tensor,
    documents_BT: Tensor,
    input_ids_BT: Tensor,
    *,
    chunk_rows: int,
) -> Tensor:
    """Return, for validation, a float64 [K, 4]: summed loss, labels ranked 1st, in 5, and all.

    A label that the heads do not know adds no loss, and is never hit.
    """
    counts_K4 = torch.zeros(heads.num_heads, 4, dtype=torch.float64, device=hidden_BTD.device)
    words_BT = heads.words_of(labels_BT)
    for k in range(heads.num_heads):
        is_labelled_BT, labels_R = head_labels(words_BT, is_trained_BT, documents_BT, k + 1)
        index_R = is_labelled_BT.flatten().nonzero()[:, 0]
        inputs = head_inputs(heads, k, index_R, hidden_BTD, input_ids_BT)
        chunks = [part.split(chunk_rows) for part in (labels_R, *inputs)]
        for labels_C, *inputs_C in zip(*chunks, strict=True):
            logits_CV = heads.head_logits(k, *inputs_C).float()
            hits_C5 = logits_CV.topk(5).indices == labels_C[:, None]
            loss = cross_entropy(logits_CV, labels_C, reduction="sum")
            labels = torch.tensor(len(labels_C), device=loss.device)
            counts_K4[k] += torch.stack([loss, hits_C5[:, 0].sum(), hits_C5.sum(), labels])
    return counts_K4
