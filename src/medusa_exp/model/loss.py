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
    """One head's cross entropy on one batch, summed over its R labelled positions."""

    loss_sum: Tensor
    num_labels: int


def head_labels(
    input_ids_BT: Tensor, is_trained_BT: Tensor, documents_BT: Tensor, head: int
) -> tuple[Tensor, Tensor]:
    """Return (is_labelled_BT, labels_R) of head k.

    Position t is labelled when token t+1+k is the assistant's and of the same document; its label
    is that token.
    """
    shift = 1 + head
    is_label_BS = is_trained_BT[:, shift:] & (documents_BT[:, shift:] == documents_BT[:, :-shift])
    is_labelled_BT = torch.zeros_like(is_trained_BT)
    is_labelled_BT[:, :-shift] = is_label_BS
    return is_labelled_BT, input_ids_BT[:, shift:][is_label_BS]


def medusa_losses(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    input_ids_BT: Tensor,
    is_trained_BT: Tensor,
    documents_BT: Tensor,
    *,
    chunk_rows: int,
) -> list[HeadLoss]:
    """Compute every head's cross entropy, summed, in nats.

    Only labelled rows are projected, `chunk_rows` at a time, and their logits are computed again
    in the backward pass: at most `chunk_rows` x V of them exist at once.
    """
    results = []
    for k in range(heads.num_heads):
        is_labelled_BT, labels_R = head_labels(input_ids_BT, is_trained_BT, documents_BT, k + 1)
        hidden_RD = hidden_BTD[is_labelled_BT]
        results.append(_chunked(heads, k, hidden_RD, labels_R, chunk_rows))
    return results


def medusa_loss(losses: list[HeadLoss], decay: float) -> Tensor:
    """Return sum over heads k of decay**k times the head's mean loss (Medusa, equation 1).

    A head without a label in this batch contributes zero, not NaN.
    """
    terms = [
        decay ** (k + 1) * loss.loss_sum / max(loss.num_labels, 1) for k, loss in enumerate(losses)
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def medusa_counts(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    input_ids_BT: Tensor,
    is_trained_BT: Tensor,
    documents_BT: Tensor,
    *,
    chunk_rows: int,
) -> Tensor:
    """Return, for validation, a float64 [K, 4]: summed loss, labels ranked 1st, in 5, and all."""
    counts_K4 = torch.zeros(heads.num_heads, 4, dtype=torch.float64, device=hidden_BTD.device)
    for k in range(heads.num_heads):
        is_labelled_BT, labels_R = head_labels(input_ids_BT, is_trained_BT, documents_BT, k + 1)
        rows = hidden_BTD[is_labelled_BT].split(chunk_rows)
        for rows_CD, labels_C in zip(rows, labels_R.split(chunk_rows), strict=True):
            logits_CV = heads.head_logits(k, rows_CD).float()
            hits_C5 = logits_CV.topk(5).indices == labels_C[:, None]
            loss = cross_entropy(logits_CV, labels_C, reduction="sum")
            labels = torch.tensor(len(labels_C), device=loss.device)
            counts_K4[k] += torch.stack([loss, hits_C5[:, 0].sum(), hits_C5.sum(), labels])
    return counts_K4


def _chunked(
    heads: MedusaHeads, k: int, hidden_RD: Tensor, labels_R: Tensor, chunk_rows: int
) -> HeadLoss:
    def chunk_loss(rows_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = heads.head_logits(k, rows_CD).float()  # autocast leaves them in bf16
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
