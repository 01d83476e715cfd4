"""Which positions of a batch have a label for a head.

B batch, T time, K heads, R labelled positions.
"""

import torch
from torch import Tensor


def is_labelled(is_trained_BT: Tensor, documents_BT: Tensor, head: int) -> Tensor:
    """Return [B, T], True where head k learns (k = 0: the backbone's own lm_head).

    That is at position t where token t+1+k is the assistant's and of the same document.
    """
    shift = 1 + head
    is_labelled_BT = torch.zeros_like(is_trained_BT)
    is_labelled_BT[:, :-shift] = is_trained_BT[:, shift:] & (
        documents_BT[:, shift:] == documents_BT[:, :-shift]
    )
    return is_labelled_BT


def labelled_index(is_trained_BT: Tensor, documents_BT: Tensor, head: int) -> Tensor:
    """Return index_R, the flat positions b * T + t that `is_labelled` has, in order."""
    return is_labelled(is_trained_BT, documents_BT, head).flatten().nonzero()[:, 0]


def label_counts(is_trained_BT: Tensor, documents_BT: Tensor, num_heads: int) -> Tensor:
    """Return how many labels the lm_head and each head have in a batch [1 + K]."""
    heads = range(num_heads + 1)
    return torch.stack([is_labelled(is_trained_BT, documents_BT, k).sum() for k in heads])
