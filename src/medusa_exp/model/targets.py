"""What heads are to predict at a position, and the loss of a row: of a token, or of a distribution.

With p the backbone's distribution at a position and q the head's, a token drawn from q is accepted
with probability alpha = sum_v min(p_v, q_v) (speculative sampling, Leviathan et al. 2023).

C rows of a chunk, R rows, D hidden, V vocabulary, W tokens of the head vocabulary (V, or fewer of
them), J likeliest tokens, X tokens of one or the other, B batch, T time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

_TINY = 1e-30
"""The least probability whose logarithm is taken: all of p may lie where no head can reach."""
ROWS = 1024
"""Rows whose logits of the backbone exist at one time."""
NextLogits = Callable[[Tensor], Tensor]
"""From hidden_RD to the backbone's logits_RW, or log-probabilities, of the head vocabulary."""
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


class DistributionTargets:
    """KL divergence of a head's distribution from the backbone's."""

    def __init__(
        self, hidden_BTD: Tensor, next_logits: NextLogits, *, measures_acceptance: bool = False
    ) -> None:
        """Take the backbone's hidden states, and what makes logits of them."""
        self.hidden = hidden_BTD.flatten(0, 1)
        self.next_logits = next_logits
        self.measures_acceptance = measures_acceptance

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (hidden_RD,): their logits are made chunk by chunk."""
        return (self.hidden[index_R],)

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return KL(backbone || head) of each row, of the head vocabulary alone."""
        with torch.no_grad():
            teacher_CW = self.next_logits(rows[0]).float().softmax(-1)
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
        next_logits: NextLogits,
        num_top: int,
        *,
        is_truncated: bool = True,
    ) -> None:
        """Read the backbone at these flat positions b * T + t.

        is_truncated: make the probabilities sum to 1. Else they are what `next_logits` says.
        """
        hidden_ID = hidden_BTD.flatten(0, 1)  # I = B * T
        self.row = torch.zeros(len(hidden_ID), dtype=torch.long, device=index_R.device)
        self.row[index_R] = torch.arange(len(index_R), device=index_R.device)
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
        kl_C = self._kl(p_CX, (p_CX * log_q_CX).sum(-1))
        return self.mix(alpha_C, self.share(alpha_C), kl_C), alpha_C.detach()

    def share(self, alpha_C: Tensor) -> Tensor:
        """Return the share of KL in the loss of each row."""
        if self.kind != "lk":
            return torch.zeros_like(alpha_C, requires_grad=False)
        return (-self.lk_decay * alpha_C.detach()).exp()

    def mix(self, alpha_C: Tensor, share_C: Tensor, kl_C: Tensor) -> Tensor:
        """Return the loss of each row of its parts."""
        if self.kind == "tv":
            return 1 - alpha_C
        return share_C * kl_C - (1 - share_C) * alpha_C.clamp(min=_TINY).log()

    def of_logits(self, log_p_CW: Tensor, logits_CW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of each row, its gradient by the logits [C, W], and alpha.

        With a = 1[q < p], d alpha / d logits = q * (a - sum_v a_v q_v), and d KL / d logits =
        S * q - p. Left to autograd, twice as many tensors [C, W] would exist at one time.
        """
        p_CW, log_z_C = log_p_CW.exp(), logits_CW.logsumexp(-1)
        reach_C = p_CW.sum(-1)
        kl_C = self._kl(p_CW, (p_CW * logits_CW).sum(-1) - reach_C * log_z_C)
        q_CW = (logits_CW - log_z_C[:, None]).exp_()
        alpha_C = torch.minimum(p_CW, q_CW).sum(-1)
        share_C = self.share(alpha_C)
        # What alpha's gradient counts: 1, or that of its logarithm.
        slope_C = (1 - share_C) / (1 if self.kind == "tv" else alpha_C.clamp(min=_TINY))
        is_less_CW = q_CW < p_CW
        less_C = (q_CW * is_less_CW).sum(-1)
        gradient_CW = is_less_CW * -slope_C[:, None]
        gradient_CW += (share_C * reach_C + slope_C * less_C)[:, None]
        gradient_CW.mul_(q_CW).sub_(p_CW.mul_(share_C[:, None]))
        return self.mix(alpha_C, share_C, kl_C), gradient_CW, alpha_C

    def _kl(self, p_CX: Tensor, of_q_C: Tensor) -> Tensor:
        """Return S * KL(p / S || q); of_q_C is sum_v p_v log q_v."""
        if self.kind != "lk":
            return of_q_C
        reach_C = p_CX.sum(-1)
        return (
            torch.special.xlogy(p_CX, p_CX).sum(-1) - torch.special.xlogy(reach_C, reach_C) - of_q_C
        )


class _ByLogits(torch.autograd.Function):
    """`AcceptanceLoss.of_logits`, which makes the gradient with the loss."""

    @staticmethod
    def forward(
        ctx: Any, logits_CW: Tensor, log_p_CW: Tensor, form: AcceptanceLoss
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, and alpha."""
        loss_C, gradient_CW, alpha_C = form.of_logits(log_p_CW, logits_CW)
        ctx.save_for_backward(gradient_CW)
        ctx.mark_non_differentiable(alpha_C)
        return loss_C, alpha_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient, times that of each row."""
        [gradient_CW] = ctx.saved_tensors
        return gradient_CW * grad_outputs[0][:, None], None, None


class AcceptanceTargets:
    """Losses that fall with what is accepted of sampled drafts, by the backbone's distribution."""

    def __init__(
        self, hidden_BTD: Tensor, next_log_probs: NextLogits, form: AcceptanceLoss
    ) -> None:
        """Take hidden states of the backbone, and what makes log-probabilities [R, W] of them."""
        self.hidden = hidden_BTD.flatten(0, 1)
        self.next_log_probs, self.form = next_log_probs, form

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return (hidden_RD,): their probabilities are computed chunk by chunk."""
        return (self.hidden[index_R],)

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> RowLosses:
        """Return loss and alpha of each row."""
        with torch.no_grad():
            log_p_CW = self.next_log_probs(rows[0])
        losses: RowLosses = _ByLogits.apply(logits_CW, log_p_CW, self.form)
        return losses


class TopAcceptanceTargets(TopTargets):
    """The same by the backbone's J likeliest tokens, as if others were never accepted."""

    def __init__(
        self,
        hidden_BTD: Tensor,
        index_R: Tensor,
        next_log_probs: NextLogits,
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
