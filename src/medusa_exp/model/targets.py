"""What heads are to predict at a position, and the loss of a row: of a token, or of a distribution.

With p the backbone's distribution at a position and q the head's, a token drawn from q is accepted
with probability alpha = sum_v min(p_v, q_v) (speculative sampling, Leviathan et al. 2023), token by
token; `decode/traversal.py`, which judges whole paths, accepts no less.

C rows of a chunk, R rows, D hidden, V vocabulary, W tokens of the head vocabulary (V, or fewer of
them), J likeliest tokens, X tokens of one or the other, B batch, T time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from medusa_exp.runs.machine import gpu_memory

_TINY = 1e-30
"""The least probability whose logarithm is taken: all of p may lie where no head can reach."""
ROWS = 1024
"""Rows whose logits of the backbone exist at one time."""
_CPU_ROOM = 2**30
"""Bytes of probabilities that may be kept on a CPU, whatever its memory: it has other work, too."""
_SHARE = 16
"""Of a GPU's memory, one part in so many is for them."""
FromHidden = Callable[[Tensor], Tensor]
"""From hidden_RD to the backbone's logits_RW, or (log-)probabilities, of the head vocabulary."""
RowLosses = tuple[Tensor, Tensor | None]
"""The loss of each row in nats, and its alpha, without gradient, where that is known."""


class Targets(Protocol):
    """What heads are to predict at a position: a token, or the backbone's distribution.

    What is large belongs into `losses`, which runs chunk by chunk, twice; what is small into `at`.
    """

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return, with a row each, what follows the tokens at flat positions b * T + t."""
        ...

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return loss and alpha of each of some rows of `at`."""
        ...


class TokenTargets:
    """Cross entropy with a token."""

    def __init__(self, labels_BT: Tensor) -> None:
        """Take, at each position, the token to be predicted there."""
        self.labels = labels_BT.flatten()

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (labels_R,)."""
        return (self.labels[index_R + 1],)

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return the cross entropy of each row, and the probability of its token.

        A label outside the head vocabulary adds no loss, and is never drafted.
        """
        losses_C = cross_entropy(logits_CW, rows[0], reduction="none")
        return losses_C, losses_C.detach().neg().exp().masked_fill(rows[0] < 0, 0.0)


class Teacher:
    """The backbone's probabilities at positions of a batch, of the tokens of the head vocabulary.

    Each head asks for nearly all of them, and twice where logits are computed again: kept, they
    cost one product with the backbone's lm_head in place of one or two for each head.
    """

    def __init__(
        self, hidden_BTD: Tensor, probabilities: FromHidden, index_R: Tensor | None = None
    ) -> None:
        """Take hidden states of the backbone, and what makes probabilities p_RW of them.

        index_R: flat positions b * T + t: the only ones that are asked for then. Of these p is
            computed now and kept, [R, W] in float32; without them, wherever it is asked for.
        """
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

    def at(self, index_R: Tensor) -> Tensor:
        """Return, with a row each, what `of` reads for these positions."""
        return self._hidden[index_R] if self._row is None else self._row[index_R]

    @torch.no_grad()
    def of(self, rows: Tensor) -> Tensor:
        """Return p_CW of some rows of `at`."""
        return self._probabilities(rows) if self._kept is None else self._kept.index_select(0, rows)


def kept_rows(device: torch.device, num_tokens: int) -> int:
    """Return at how many positions a `Teacher` may keep the probabilities of so many tokens."""
    memory = gpu_memory(device)
    room = _CPU_ROOM if memory is None else memory // _SHARE
    return room // (4 * num_tokens)


def _rows_of(index_R: Tensor, number: int) -> Tensor:
    """Return for each of so many positions its place in index_R, or 0."""
    row_I = torch.zeros(number, dtype=torch.long, device=index_R.device)
    row_I[index_R] = torch.arange(len(index_R), device=index_R.device)
    return row_I


class _TeachersTargets:
    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return what the teacher reads."""
        return (self.teacher.at(index_R),)


class DistributionTargets(_TeachersTargets):
    """KL divergence of a head's distribution from the backbone's."""

    def __init__(self, teacher: Teacher, *, measures_acceptance: bool = False) -> None:
        """Take a teacher whose probabilities are of the head vocabulary alone, and sum to 1."""
        super().__init__(teacher)
        self.measures_acceptance = measures_acceptance

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return KL(backbone || head) of each row, of the head vocabulary alone."""
        teacher_CW = self.teacher.of(*rows)
        log_q_CW, accepted_C = logits_CW.log_softmax(-1), None
        if self.measures_acceptance:
            q_CW = log_q_CW.detach().exp()
            accepted_C = torch.minimum(q_CW, teacher_CW, out=q_CW).sum(-1)
            del q_CW
        # With probabilities and not their logarithms, torch takes 0 log 0 as 0.
        return kl_div(log_q_CW, teacher_CW, reduction="none").sum(-1), accepted_C


class TopTargets:
    """KL divergence from the backbone's J likeliest tokens, whose probabilities are made to sum
    to 1. All heads share what is computed once for each position."""

    def __init__(
        self,
        hidden_BTD: Tensor,
        index_R: Tensor,
        next_logits: FromHidden,
        num_top: int,
        *,
        is_truncated: bool = True,
    ) -> None:
        """Read the backbone at these flat positions b * T + t.

        is_truncated: make the probabilities sum to 1. Else they are what `next_logits` says.
        """
        hidden_ID = hidden_BTD.flatten(0, 1)  # I = B * T
        self.row = _rows_of(index_R, len(hidden_ID))
        tops = []
        with torch.no_grad():
            for rows_RD in hidden_ID[index_R].split(ROWS):
                logits_RW = next_logits(rows_RD).float()
                tops.append(logits_RW.topk(min(num_top, logits_RW.shape[-1])))
            self.tokens = torch.cat([top.indices for top in tops])
            self.log_probs = torch.cat(
                [top.values.log_softmax(-1) if is_truncated else top.values for top in tops]
            )

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (tokens_RJ, log_probs_RJ)."""
        row_R = self.row[index_R]
        return self.tokens[row_R], self.log_probs[row_R]

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return KL(truncated backbone || head) of each row."""
        tokens_CJ, log_probs_CJ = rows
        head_CJ = logits_CW.gather(1, tokens_CJ) - logits_CW.logsumexp(-1, keepdim=True)
        accepted_C = torch.minimum(log_probs_CJ, head_CJ.detach()).exp().sum(-1)
        return (log_probs_CJ.exp() * (log_probs_CJ - head_CJ)).sum(-1), accepted_C


@dataclass(frozen=True)
class AcceptanceLoss:
    """A loss that falls with alpha = sum_v min(p_v, q_v), the probability that a draft token
    sampled from a head's distribution q is accepted where the backbone's is p.

        tv   1 - alpha, the total variation of p and q
        nla  -log alpha
        lk   share * KL(p || q) + (1 - share) * -log alpha, share = exp(-lk_decay * alpha)

    tv has next to no gradient where a head knows nothing yet; KL has one. The share is a number of
    each row, which is not differentiated. (nla and lk: model cards of the heads by nebius, 2026.)

    Where heads propose X tokens of V alone (their own vocabulary, or the J likeliest of p), p sums
    to S < 1: alpha is at most S, and KL(p || q) stands for S * KL(p / S || q).
    """

    kind: str
    """tv, nla or lk."""
    lk_decay: float = 10.0

    def of(self, log_p_CX: Tensor, log_q_CX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, of probabilities as logarithms, and alpha."""
        p_CX = log_p_CX.exp()
        alpha_C = torch.minimum(p_CX, log_q_CX.exp()).sum(-1)
        kl_C = self._kl(p_CX, (p_CX * log_q_CX).sum(-1)) if self.kind == "lk" else None
        return self.mix(alpha_C, self.share(alpha_C), kl_C), alpha_C.detach()

    def share(self, alpha_C: Tensor) -> Tensor:
        """Return the share of KL in the loss of each row."""
        if self.kind != "lk":
            return torch.zeros_like(alpha_C, requires_grad=False)
        return (-self.lk_decay * alpha_C.detach()).exp()

    def mix(self, alpha_C: Tensor, share_C: Tensor, kl_C: Tensor | None) -> Tensor:
        """Return the loss of each row of its parts."""
        if self.kind == "tv":
            return 1 - alpha_C
        nla_C = -alpha_C.clamp(min=_TINY).log()
        return nla_C if kl_C is None else share_C * kl_C + (1 - share_C) * nla_C

    def of_logits(self, p_CW: Tensor, logits_CW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of each row, its gradient by the logits [C, W], and alpha.

        With m = q where q < p and else 0, d alpha / d logits = m - q * sum_v m_v, and
        d KL / d logits = S * q - p. Left to autograd, more tensors [C, W] would exist at one time.
        """
        q_CW = logits_CW.softmax(-1)
        alpha_C = torch.minimum(p_CW, q_CW).sum(-1)
        share_C, kl_C = self.share(alpha_C), None
        # What alpha's gradient counts: 1, or that of its logarithm.
        slope_C = (1 - share_C) / (1 if self.kind == "tv" else alpha_C.clamp(min=_TINY))
        m_CW = torch.lt(q_CW, p_CW, out=torch.empty_like(q_CW)).mul_(q_CW)  # a mask is slower
        of_q_C = slope_C * m_CW.sum(-1)
        if self.kind == "lk":
            reach_C = p_CW.sum(-1)
            p_log_q_C = (p_CW * logits_CW).sum(-1) - reach_C * logits_CW.logsumexp(-1)
            kl_C = self._kl(p_CW, p_log_q_C)
            of_q_C = of_q_C + share_C * reach_C
        gradient_CW = q_CW.mul_(of_q_C[:, None])
        gradient_CW.addcmul_(m_CW, slope_C[:, None], value=-1)
        if self.kind == "lk":
            gradient_CW.addcmul_(p_CW, share_C[:, None], value=-1)
        return self.mix(alpha_C, share_C, kl_C), gradient_CW, alpha_C

    def _kl(self, p_CX: Tensor, p_log_q_C: Tensor) -> Tensor:
        """Return S * KL(p / S || q); p_log_q_C is sum_v p_v log q_v."""
        reach_C = p_CX.sum(-1)
        return (
            torch.special.xlogy(p_CX, p_CX).sum(-1)
            - torch.special.xlogy(reach_C, reach_C)
            - p_log_q_C
        )


class _ByLogits(torch.autograd.Function):
    """`AcceptanceLoss.of_logits`, which makes the gradient with the loss."""

    @staticmethod
    def forward(
        ctx: Any, logits_CW: Tensor, p_CW: Tensor, form: AcceptanceLoss
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, and alpha."""
        loss_C, gradient_CW, alpha_C = form.of_logits(p_CW, logits_CW)
        ctx.save_for_backward(gradient_CW)
        ctx.mark_non_differentiable(alpha_C)
        return loss_C, alpha_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient, times that of each row."""
        [gradient_CW] = ctx.saved_tensors
        return gradient_CW * grad_outputs[0][:, None], None, None


class AcceptanceTargets(_TeachersTargets):
    """Losses that fall with what is accepted of sampled drafts, by the backbone's distribution."""

    def __init__(self, teacher: Teacher, form: AcceptanceLoss) -> None:
        """Take a teacher whose probabilities sum to less than 1 where heads cannot reach all."""
        super().__init__(teacher)
        self.form = form

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return loss and alpha of each row."""
        losses: RowLosses = _ByLogits.apply(logits_CW, self.teacher.of(*rows), self.form)
        return losses


class TopAcceptanceTargets(TopTargets):
    """The same by the backbone's J likeliest tokens, as if others were never accepted."""

    def __init__(
        self,
        hidden_BTD: Tensor,
        index_R: Tensor,
        next_log_probs: FromHidden,
        num_top: int,
        form: AcceptanceLoss,
    ) -> None:
        """Read the backbone at these flat positions b * T + t."""
        super().__init__(hidden_BTD, index_R, next_log_probs, num_top, is_truncated=False)
        self.form = form

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return loss and alpha of each row."""
        tokens_CJ, log_p_CJ = rows
        log_q_CJ = logits_CW.gather(1, tokens_CJ) - logits_CW.logsumexp(-1, keepdim=True)
        return self.form.of(log_p_CJ, log_q_CJ)
