"""What a head is to say at a position: a token, or the backbone's own next-token distribution.

The three classes have one interface. `at(index_R)` picks what is to be said after the tokens at
flat positions b * T + t, as tensors with a row each; `losses(logits_CW, ...)` takes some of these
rows and returns a loss a row, in nats. A loss computes its chunks twice, so that what is large
belongs into `losses` and what is small into `at`.

B batch, T time, D hidden, V vocabulary, W words that the heads know (V, or fewer of them), R rows,
C rows of a chunk, J likeliest tokens.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

_ROWS = 1024
"""Rows whose logits of the backbone exist at one time."""

NextLogits = Callable[[Tensor], Tensor]
"""From hidden_RD to the backbone's logits_RW of the words that the heads know."""


@torch.no_grad()
def first_choices(next_logits: NextLogits, hidden_RD: Tensor) -> Tensor:
    """Return the likeliest next token at each of these hidden states: tokens_R."""
    chunks = [next_logits(hidden_CD).argmax(-1) for hidden_CD in hidden_RD.split(_ROWS)]
    return torch.cat(chunks)


class Targets(Protocol):
    """What the heads are to say."""

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return what is to be said after the tokens at these flat positions."""
        ...

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return the loss of each row, in nats."""
        ...


class TokenTargets:
    """Cross entropy with a token."""

    def __init__(self, labels_BT: Tensor) -> None:
        """Take, at each place, the token to be said there."""
        self.labels = labels_BT.flatten()

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (labels_R,)."""
        return (self.labels[index_R + 1],)

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return the cross entropy of each row."""
        return cross_entropy(logits_CW, rows[0], reduction="none")


class DistributionTargets:
    """KL divergence of a head's distribution from the backbone's."""

    def __init__(self, hidden_BTD: Tensor, next_logits: NextLogits) -> None:
        """Take the backbone's hidden states, and what makes logits of them."""
        self.hidden = hidden_BTD.flatten(0, 1)
        self.next_logits = next_logits

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (hidden_RD,): their logits are made chunk by chunk."""
        return (self.hidden[index_R],)

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return KL(backbone || head) of each row."""
        with torch.no_grad():
            teacher_CW = self.next_logits(rows[0]).float().softmax(-1)
        # With probabilities and not their logarithms, torch takes 0 log 0 as 0.
        return kl_div(logits_CW.log_softmax(-1), teacher_CW, reduction="none").sum(-1)


class TopTargets:
    """KL divergence from the backbone's J likeliest tokens, whose probabilities are made to sum
    to 1. All heads share what is computed once for each position."""

    def __init__(
        self, hidden_BTD: Tensor, is_wanted_BT: Tensor, next_logits: NextLogits, num_top: int
    ) -> None:
        """Read the backbone at the wanted positions."""
        wanted = is_wanted_BT.flatten()
        self.row = wanted.cumsum(0) - 1
        tops = []
        with torch.no_grad():
            for rows_RD in hidden_BTD.flatten(0, 1)[wanted].split(_ROWS):
                logits_RW = next_logits(rows_RD).float()
                tops.append(logits_RW.topk(min(num_top, logits_RW.shape[-1])))
            self.tokens = torch.cat([top.indices for top in tops])
            self.log_probs = torch.cat([top.values.log_softmax(-1) for top in tops])

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (tokens_RJ, log_probs_RJ)."""
        row_R = self.row[index_R]
        return self.tokens[row_R], self.log_probs[row_R]

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return KL(truncated backbone || head) of each row."""
        tokens_CJ, log_probs_CJ = rows
        said_CJ = logits_CW.gather(1, tokens_CJ) - logits_CW.logsumexp(-1, keepdim=True)
        return (log_probs_CJ.exp() * (log_probs_CJ - said_CJ)).sum(-1)
