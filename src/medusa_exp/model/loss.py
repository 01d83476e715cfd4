"""The Medusa-1 loss, without ever holding the logits of all heads.

B batch, T time, D hidden, V vocabulary, K heads, R labelled rows of one head, C rows of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from medusa_exp.data.labels import is_labelled
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
    *,
    chunk_rows: int,
) -> list[HeadLoss]:
    """Compute every head's loss, summed, in nats.

    Only labelled rows are projected, `chunk_rows` at a time, and their logits are computed again
    in the backward pass: at most `chunk_rows` x V of them exist at once.
    """
    results = []
    for k in range(heads.num_heads):
        is_labelled_BT = is_labelled(is_trained_BT, documents_BT, k + 1)
        index_R = is_labelled_BT.flatten().nonzero()[:, 0]
        # Head k is to say at t what is to be said after token t+k.
        rows = (hidden_BTD.flatten(0, 1)[index_R], *targets.at(index_R + k + 1))
        results.append(HeadLoss(_chunked(heads, k, targets, rows, chunk_rows), len(index_R)))
    return results


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
    *,
    chunk_rows: int,
) -> Tensor:
    """Return, for validation, a float64 [K, 4]: summed loss, labels ranked 1st, in 5, and all."""
    counts_K4 = torch.zeros(heads.num_heads, 4, dtype=torch.float64, device=hidden_BTD.device)
    for k in range(heads.num_heads):
        is_labelled_BT, labels_R = head_labels(labels_BT, is_trained_BT, documents_BT, k + 1)
        rows = hidden_BTD[is_labelled_BT].split(chunk_rows)
        for rows_CD, labels_C in zip(rows, labels_R.split(chunk_rows), strict=True):
            logits_CV = heads.head_logits(k, rows_CD).float()
            hits_C5 = logits_CV.topk(5).indices == labels_C[:, None]
            loss = cross_entropy(logits_CV, labels_C, reduction="sum")
            labels = torch.tensor(len(labels_C), device=loss.device)
            counts_K4[k] += torch.stack([loss, hits_C5[:, 0].sum(), hits_C5.sum(), labels])
    return counts_K4


def _chunked(
    heads: MedusaHeads, k: int, targets: Targets, rows: tuple[Tensor, ...], chunk_rows: int
) -> Tensor:
    def chunk_loss(is_real_C: Tensor, hidden_CD: Tensor, *target: Tensor) -> Tensor:
        logits_CV = heads.head_logits(k, hidden_CD).float()  # autocast leaves them in bf16
        return (targets.losses(logits_CV, *target) * is_real_C).sum()

    # Every chunk has the same shape: each new one would cost the libraries a set-up of its own.
    number = len(rows[0])
    missing = -number % chunk_rows or (chunk_rows if not number else 0)
    is_real_R = torch.ones(number, device=rows[0].device)
    padded = [
        pad(row, (0, 0) * (row.ndim - 1) + (0, missing)).split(chunk_rows)
        for row in (is_real_R, *rows)
    ]
    sums = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in zip(*padded, strict=True)
    ]
    return torch.stack(sums).sum()
