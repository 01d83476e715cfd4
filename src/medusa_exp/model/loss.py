"""The Medusa-1 loss, without ever holding the logits of all heads.

B batch, T time, D hidden, V vocabulary, K heads, R labelled rows of one head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from medusa_exp.model.heads import MedusaHeads

_NO_LABEL = -100


@dataclass
class HeadLoss:
    """What one head did on one batch, as sums over its R labelled positions."""

    loss_sum: Tensor
    num_labels: int
    top1_sum: Tensor | None = None
    top5_sum: Tensor | None = None


def head_labels(input_ids_BT: Tensor, is_trained_BT: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Return (is_labelled_BT, labels_R) of head k.

    Position t is labelled when token t+1+k exists and is the assistant's; its label is that token.
    """
    shift = 1 + head
    is_labelled_BT = torch.zeros_like(is_trained_BT)
    is_labelled_BT[:, :-shift] = is_trained_BT[:, shift:]
    return is_labelled_BT, input_ids_BT[:, shift:][is_trained_BT[:, shift:]]


def medusa_losses(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    input_ids_BT: Tensor,
    is_trained_BT: Tensor,
    *,
    chunk_rows: int,
) -> list[HeadLoss]:
    """Compute every head's cross entropy, summed, in nats.

    Only labelled rows are projected, `chunk_rows` at a time, and their logits are computed again
    in the backward pass: at most `chunk_rows` x V of them exist at once.
    """
    results = []
    for k in range(heads.num_heads):
        is_labelled_BT, labels_R = head_labels(input_ids_BT, is_trained_BT, k + 1)
        hidden_RD = hidden_BTD[is_labelled_BT]
        results.append(_chunked(heads, k, hidden_RD, labels_R, chunk_rows))
    return results


def weighted_mean(losses: list[HeadLoss], decay: float) -> Tensor:
    """Return sum over heads k of decay**k times the head's mean loss (Medusa, equation 1).

    A head without a label in this batch contributes zero, not NaN.
    """
    terms = [
        decay ** (k + 1) * loss.loss_sum / max(loss.num_labels, 1) for k, loss in enumerate(losses)
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def medusa_hits(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    input_ids_BT: Tensor,
    is_trained_BT: Tensor,
    *,
    chunk_rows: int,
) -> list[HeadLoss]:
    """Like `medusa_losses`, for validation: counts also how often the label ranks 1st or in 5."""
    results = medusa_losses(heads, hidden_BTD, input_ids_BT, is_trained_BT, chunk_rows=chunk_rows)
    for k, result in enumerate(results):
        is_labelled_BT, labels_R = head_labels(input_ids_BT, is_trained_BT, k + 1)
        hits_5 = torch.zeros(5, dtype=torch.long, device=labels_R.device)
        chunks = zip(
            hidden_BTD[is_labelled_BT].split(chunk_rows), labels_R.split(chunk_rows), strict=True
        )
        for rows_CD, labels_C in chunks:
            guesses_C5 = _project(heads, k, rows_CD).topk(5).indices
            hits_5 += (guesses_C5 == labels_C[:, None]).sum(0)
        result.top1_sum, result.top5_sum = hits_5[0], hits_5.sum()
    return results


def _chunked(
    heads: MedusaHeads, k: int, hidden_RD: Tensor, labels_R: Tensor, chunk_rows: int
) -> HeadLoss:
    def chunk_loss(rows_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = _project(heads, k, rows_CD)
        return cross_entropy(logits_CV, labels_C, ignore_index=_NO_LABEL, reduction="sum")

    # Every chunk has the same shape: each new one would cost the libraries a set-up of its own.
    missing = -len(labels_R) % chunk_rows or (chunk_rows if not len(labels_R) else 0)
    padded_RD = pad(hidden_RD, (0, 0, 0, missing))
    padded_R = pad(labels_R, (0, missing), value=_NO_LABEL)
    chunks = zip(padded_RD.split(chunk_rows), padded_R.split(chunk_rows), strict=True)
    sums = [
        checkpoint(chunk_loss, rows_CD, labels_C, use_reentrant=False)
        for rows_CD, labels_C in chunks
    ]
    return HeadLoss(torch.stack(sums).sum(), len(labels_R))


def _project(heads: MedusaHeads, k: int, rows_CD: Tensor) -> Tensor:
    """Return one head's logits_CV in float32: autocast leaves them in bf16."""
    return heads.lm_heads[k](heads.blocks[k](rows_CD)).float()
