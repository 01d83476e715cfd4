"""What heads are to predict at a position: a token, or the backbone's distribution.

What that costs them is a `RowLoss` (row_loss.py).

C rows of a chunk, R rows, D hidden, V vocabulary, W tokens of the head vocabulary (V, or fewer of
them), J likeliest tokens, B batch, T time.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from medusa_exp.model.row_loss import CrossEntropy, RowLoss, TopAcceptance, TopDivergence
from medusa_exp.runs.machine import gpu_memory

ROWS = 1024
"""Rows whose logits of the backbone exist at one time."""
_TOP_DIVERGENCE = TopDivergence()
FromHidden = Callable[[Tensor], Tensor]
"""From hidden_RD to the backbone's logits_RW, or (log-)probabilities, of the head vocabulary."""


class Targets(Protocol):
    """What heads are to predict at each position, and the loss that compares them with it."""

    loss: RowLoss

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return, with a row each, what follows the tokens at flat positions b * T + t.

        Of all rows at once: what is small.
        """
        ...

    def wanted(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return what `loss` reads of some rows of `at`: what is large. It may be asked twice."""
        ...


class TokenTargets:
    """A token at each position."""

    def __init__(self, labels_BT: Tensor) -> None:
        """Take, at each position, the token to be predicted there."""
        self.labels = labels_BT.flatten()
        self.loss: RowLoss = CrossEntropy()

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (labels_R,)."""
        return (self.labels[index_R + 1],)

    def wanted(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return (labels_C,)."""
        return rows


def kept_rows(device: torch.device, num_tokens: int) -> int:
    """Return of how many positions `TeacherTargets` may keep so many tokens' probabilities."""
    return room_in(gpu_memory(device)) // (4 * num_tokens)


def room_in(memory: int | None) -> int:
    """Return bytes that one kind of tensors may take, of so many of a GPU; None on a CPU.

    A sixteenth, and on a CPU, whatever its memory, 1 GiB: it has other work, too.
    """
    return 2**30 if memory is None else memory // 16


def _rows_of(index_R: Tensor, number: int) -> Tensor:
    """Return for each of so many positions its place in index_R, or 0."""
    row_I = torch.zeros(number, dtype=torch.long, device=index_R.device)
    row_I[index_R] = torch.arange(len(index_R), device=index_R.device)
    return row_I


class TeacherTargets:
    """The backbone's distribution over the tokens of the head vocabulary.

    Each head asks for nearly all positions, and twice where logits are computed again: kept, the
    probabilities cost one product with the backbone's lm_head in place of one or two for each head.
    """

    def __init__(
        self,
        hidden_BTD: Tensor,
        probabilities: FromHidden,
        loss: RowLoss,
        index_R: Tensor | None = None,
    ) -> None:
        """Take hidden states of the backbone, and what makes probabilities p_RW of them.

        p sums to less than 1 where heads cannot reach all tokens; for a `Divergence` it is to sum
        to 1.

        index_R: flat positions b * T + t: the only ones that are asked for then. Of these p is
            computed now and kept, [R, W] in float32; without them, wherever it is asked for.
        """
        self.loss = loss
        self._hidden, self._probabilities = hidden_BTD.flatten(0, 1), probabilities
        self._kept, self._row = None, None
        if index_R is None or not len(index_R):
            return
        self._row = _rows_of(index_R, len(self._hidden))
        with torch.no_grad():
            for start in range(0, len(index_R), ROWS):
                part_CW = probabilities(self._hidden[index_R[start : start + ROWS]])
                if self._kept is None:  # filled in place: to join parts would take twice the room
                    self._kept = part_CW.new_empty(len(index_R), part_CW.shape[1])
                self._kept[start : start + ROWS] = part_CW

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return what `wanted` reads: a row of what is kept each, else a hidden state."""
        return (self._hidden[index_R] if self._row is None else self._row[index_R],)

    @torch.no_grad()
    def wanted(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return (p_CW,)."""
        [some] = rows
        kept = self._kept
        return (self._probabilities(some) if kept is None else kept.index_select(0, some),)


class TopTargets:
    """The backbone's J likeliest tokens. All heads share what is computed once for each position.

    For a `TopDivergence` their probabilities are made to sum to 1.
    """

    def __init__(
        self,
        hidden_BTD: Tensor,
        index_R: Tensor,
        scores_of: FromHidden,
        num_top: int,
        loss: TopDivergence | TopAcceptance = _TOP_DIVERGENCE,
    ) -> None:
        """Read the backbone at these flat positions b * T + t.

        scores_of: makes logits of hidden states; log-probabilities for a `TopAcceptance`.
        """
        self.loss: RowLoss = loss
        is_truncated = isinstance(loss, TopDivergence)
        hidden_ID = hidden_BTD.flatten(0, 1)  # I = B * T
        self.row = _rows_of(index_R, len(hidden_ID))
        tops = []
        with torch.no_grad():
            for rows_RD in hidden_ID[index_R].split(ROWS):
                logits_RW = scores_of(rows_RD).float()
                tops.append(logits_RW.topk(min(num_top, logits_RW.shape[-1])))
            self.tokens = torch.cat([top.indices for top in tops])
            self.log_probs = torch.cat(
                [top.values.log_softmax(-1) if is_truncated else top.values for top in tops]
            )

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (tokens_RJ, log_probs_RJ)."""
        row_R = self.row[index_R]
        return self.tokens[row_R], self.log_probs[row_R]

    def wanted(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return (tokens_CJ, log_probs_CJ)."""
        return rows
