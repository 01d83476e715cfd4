"""An answer of the backbone's in; which guess of each head came true out.

P positions, D hidden, K heads, C positions of a chunk, R ranks.
"""

import numpy as np
import torch
from torch import Tensor

from medusa_exp.model.heads import MedusaHeads

CHUNK = 256
"""Positions whose logits exist at one time."""


@torch.no_grad()
def answer_ranks(
    heads: MedusaHeads, tokens_P: Tensor, hidden_PD: Tensor, max_rank: int
) -> np.ndarray:
    """Return ranks_PK: where token t of the answer is certain, the rank of token t+k to head k.

    What is not among the first `max_rank` guesses, or stands beyond the answer's end, has rank
    `max_rank`.

    Args:
        heads: of any family; sequential ones see the answer's own tokens as drafted.
        tokens_P: the answer.
        hidden_PD: the states from which the backbone said each token.
        max_rank: how many guesses count.
    """
    words_P = heads.words_of(tokens_P)
    ranks_PK = torch.full((len(words_P), heads.num_heads), max_rank)
    rank_R = torch.arange(max_rank, device=words_P.device)
    for k in range(min(heads.num_heads, len(words_P) - 1)):
        truth_P = words_P[k + 1 :]
        inputs = [hidden_PD[: len(truth_P)].to(heads.dtype)]
        if heads.is_sequential:
            inputs.append(tokens_P.unfold(0, k + 1, 1)[: len(truth_P)])
        chunks = [part.split(CHUNK) for part in (truth_P, *inputs)]
        found = []
        for truth_C, *inputs_C in zip(*chunks, strict=True):
            guesses_CR = heads.head_logits(k, *inputs_C).topk(max_rank).indices
            is_true_CR = guesses_CR == truth_C[:, None]
            found.append(torch.where(is_true_CR, rank_R, max_rank).amin(-1))
        ranks_PK[: len(truth_P), k] = torch.cat(found).cpu()
    return ranks_PK.numpy()
