"""The Medusa-1 loss, without ever holding the logits of all heads.

B batch, T time, D hidden, W words that the heads know, K heads, R labelled rows of one head, C rows
of a chunk, J drafted tokens. `head` counts from 1, as labels and metrics do (0 is the lm_head); `k`
is an index, from 0, as the heads themselves do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from medusa_exp.data.labels import labelled_index
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
    """Return (index_R, labels_R) of a head: its label at t is token t+1+head."""
    index_R = labelled_index(is_trained_BT, documents_BT, head)
    return index_R, input_ids_BT.flatten()[index_R + 1 + head]


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

    Only labelled rows are projected, and at most `chunk_rows` x W logits exist at once.

    Args:
        heads: K of them, of any family.
        hidden_BTD: what they read: `heads_input` of the backbone's hidden states.
        targets: what they are to say, by the words that they know.
        is_trained_BT: which tokens are the assistant's.
        documents_BT: the document of each token in its row; no label crosses from one to the next.
        input_ids_BT: the text, which sequential heads see.
        chunk_rows: C.
        form: of `train.loss_form`, see `chunks.py`.
    """
    results = []
    for k in range(heads.num_heads):
        index_R = labelled_index(is_trained_BT, documents_BT, k + 1)
        inputs = head_arguments(heads, k, index_R, hidden_BTD, input_ids_BT)
        # The head at index k is head k+1: at t it is to say what is to be said after token t+k+1.
        wanted = targets.at(index_R + k + 1)
        logits_of = partial(heads.head_logits, k)
        parameters = heads.head_parameters(k) if form == "at_once" else ()
        loss_sum = chunked_loss(logits_of, targets, inputs, wanted, chunk_rows, parameters)
        results.append(HeadLoss(loss_sum, len(index_R)))
    return results


def head_arguments(
    heads: MedusaHeads, k: int, index_R: Tensor, hidden_BTD: Tensor, input_ids_BT: Tensor
) -> tuple[Tensor, ...]:
    """Return what `head_logits` takes besides k: (hidden_RD,), and drafted_RJ if it is sequential.

    Such heads see the text's own tokens as if they had been drafted.

    Args:
        heads: of any family.
        k: which head.
        index_R: flat positions b * T + t.
        hidden_BTD: what the heads read.
        input_ids_BT: the text.
    """
    hidden_RD = hidden_BTD.flatten(0, 1)[index_R]
    if not heads.is_sequential:
        return (hidden_RD,)
    next_J = torch.arange(1, k + 2, device=index_R.device)
    return hidden_RD, input_ids_BT.flatten()[index_R[:, None] + next_J]


def medusa_loss(
    losses: list[HeadLoss], decay: float, totals: Sequence[int] | None = None
) -> Tensor:
    """Return the sum over heads of decay**head times its mean loss (Medusa, equation 1).

    Args:
        losses: of the heads on a batch.
        decay: its powers are the lambdas.
        totals: what each head's sum is divided by, where this batch is a part of a larger one; by
            default its own labels. A head without a label contributes zero, not NaN.
    """
    if totals is None:
        totals = [loss.num_labels for loss in losses]
    terms = [
        decay**head * loss.loss_sum / max(total, 1)
        for head, (loss, total) in enumerate(zip(losses, totals, strict=True), 1)
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
    """Return, for validation, counts_K4 in float64: loss summed in nats, and the numbers of labels
    that a head ranked first, that it ranked among its first five, and of all.

    A label that the heads do not know adds no loss, and is never hit.
    """
    counts_K4 = torch.zeros(heads.num_heads, 4, dtype=torch.float64, device=hidden_BTD.device)
    words_BT = heads.words_of(labels_BT)
    for k in range(heads.num_heads):
        index_R, labels_R = head_labels(words_BT, is_trained_BT, documents_BT, k + 1)
        inputs = head_arguments(heads, k, index_R, hidden_BTD, input_ids_BT)
        chunks = [part.split(chunk_rows) for part in (labels_R, *inputs)]
        for labels_C, *inputs_C in zip(*chunks, strict=True):
            logits_CW = heads.head_logits(k, *inputs_C).float()
            hits_C5 = logits_CW.topk(5).indices == labels_C[:, None]
            loss = cross_entropy(logits_CW, labels_C, reduction="sum")
            labels = torch.tensor(len(labels_C), device=loss.device)
            counts_K4[k] += torch.stack([loss, hits_C5[:, 0].sum(), hits_C5.sum(), labels])
    return counts_K4
