"""The loss of a row of logits, and the probability that a draft token of it is accepted.

With p the backbone's distribution at a position and q the head's, a token drawn from q is accepted
with probability alpha = sum_v min(p_v, q_v) (speculative sampling, Leviathan et al. 2023), token by
token; `decode/traversal.py`, which judges whole paths, accepts no less.

Each loss is a function of tensors alone, so that torch can compile it (`compiled_loss`). If it does
not, one operation after the other reads and writes C x W numbers: of logits in bfloat16, 36 bytes
each with cross entropy and 96 with nla. Compiled they are 6 and 12, forward and backward together,
in what inductor writes for an H200. What comes out differs in rounding.

C rows of a chunk, W tokens of the head vocabulary, J likeliest tokens, X tokens of one of these.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

log = logging.getLogger(__name__)

_TINY = 1e-30
"""The least probability whose logarithm is taken: all of p may lie where no head can reach."""
_KINDS = 64
"""Graphs of a process: losses, by vocabulary and precision. torch allows 8."""
RowLosses = tuple[Tensor, Tensor | None]
"""The loss of each row in nats, and its alpha, without gradient, where that is known."""


class RowLoss(Protocol):
    """A loss of rows, one by one. Compares and hashes as what it computes."""

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return loss and alpha of each row; `wanted` has what it is compared with, by rows.

        Logits may come in 16 bits: what is computed of them is computed in float32.
        """
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy with a token."""

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return the cross entropy with labels_C, and the probability of these.

        A label outside the head vocabulary adds no loss, and is never drafted.
        """
        [labels_C] = wanted
        losses_C = nll_loss(_log_softmax(logits_CW), labels_C, reduction="none")
        return losses_C, losses_C.detach().neg().exp().masked_fill(labels_C < 0, 0.0)


@dataclass(frozen=True)
class Divergence:
    """KL divergence of a head's distribution from the backbone's."""

    measures_acceptance: bool = False

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return KL(p || q), of p_CW that sum to 1 over the head vocabulary."""
        [p_CW] = wanted
        log_q_CW, accepted_C = _log_softmax(logits_CW), None
        if self.measures_acceptance:
            q_CW = log_q_CW.detach().exp()
            accepted_C = torch.minimum(q_CW, p_CW, out=q_CW).sum(-1)
            del q_CW
        # With probabilities and not their logarithms, torch takes 0 log 0 as 0.
        return kl_div(log_q_CW, p_CW, reduction="none").sum(-1), accepted_C


@dataclass(frozen=True)
class TopDivergence:
    """KL divergence from the backbone's J likeliest tokens."""

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return KL(p || q), of tokens_CJ and log_p_CJ, whose p sum to 1."""
        tokens_CJ, log_p_CJ = wanted
        log_q_CJ = _log_probs_of(tokens_CJ, logits_CW)
        accepted_C = torch.minimum(log_p_CJ, log_q_CJ.detach()).exp().sum(-1)
        return (log_p_CJ.exp() * (log_p_CJ - log_q_CJ)).sum(-1), accepted_C


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

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return loss and alpha of p_CW."""
        losses: RowLosses = _ByLogits.apply(logits_CW, *wanted, self)
        return losses

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
        q_CW = logits_CW.softmax(-1, dtype=_wide(logits_CW))
        alpha_C = torch.minimum(p_CW, q_CW).sum(-1)
        share_C, kl_C = self.share(alpha_C), None
        # What alpha's gradient counts: 1, or that of its logarithm.
        slope_C = (1 - share_C) / (1 if self.kind == "tv" else alpha_C.clamp(min=_TINY))
        m_CW = torch.lt(q_CW, p_CW, out=torch.empty_like(q_CW)).mul_(q_CW)  # a mask is slower
        of_q_C = slope_C * m_CW.sum(-1)
        if self.kind == "lk":
            reach_C = p_CW.sum(-1)
            log_sum_C = logits_CW.to(q_CW.dtype).logsumexp(-1)
            p_log_q_C = (p_CW * logits_CW).sum(-1) - reach_C * log_sum_C
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
        ctx.dtype = logits_CW.dtype
        ctx.mark_non_differentiable(alpha_C)
        return loss_C, alpha_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient, times that of each row."""
        [gradient_CW] = ctx.saved_tensors
        return (gradient_CW * grad_outputs[0][:, None]).to(ctx.dtype), None, None


@dataclass(frozen=True)
class TopAcceptance:
    """An AcceptanceLoss of the backbone's J likeliest tokens, as if others were never accepted."""

    loss: AcceptanceLoss

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return loss and alpha of tokens_CJ and log_p_CJ."""
        tokens_CJ, log_p_CJ = wanted
        return self.loss.of(log_p_CJ, _log_probs_of(tokens_CJ, logits_CW))


def _wide(logits_CW: Tensor) -> torch.dtype:
    return torch.promote_types(logits_CW.dtype, torch.float32)


def _log_softmax(logits_CW: Tensor) -> Tensor:
    return logits_CW.log_softmax(-1, dtype=_wide(logits_CW))


def _log_probs_of(tokens_CJ: Tensor, logits_CW: Tensor) -> Tensor:
    wide_CW = logits_CW.to(_wide(logits_CW))
    return wide_CW.gather(1, tokens_CJ) - wide_CW.logsumexp(-1, keepdim=True)


class _Compiled:
    """A loss under torch.compile. Where torch cannot, it runs uncompiled, and a line says why."""

    def __init__(self, plain: RowLoss, backend: Any) -> None:
        def run(*tensors: Tensor) -> RowLosses:
            return plain(*tensors)

        self._plain, self._is_refused = plain, False
        # Compiled for the number of rows that comes first, and used for all. For few rows inductor
        # would split a row's reduction over blocks, and read the row twice.
        options = {"split_reductions": False} if backend == "inductor" else None
        self._run = torch.compile(
            run, backend=backend, fullgraph=True, dynamic=False, options=options
        )

    def __call__(self, logits_CW: Tensor, *wanted: Tensor) -> RowLosses:
        """Return loss and alpha of each row; compiled, with its gradient, once for all numbers of
        rows."""
        if not self._is_refused:
            from torch import _dynamo as dynamo  # private: torch 2.13; takes a second
            from torch._functorch import config as functorch_config  # private: torch 2.13

            for tensor in (logits_CW, *wanted):
                dynamo.maybe_mark_dynamic(tensor, 0)
            refusals = (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit)
            try:
                with (
                    dynamo.config.patch(recompile_limit=_KINDS),
                    # The gradient is compiled with the loss: if torch cannot, it says so here.
                    functorch_config.patch(force_non_lazy_backward_lowering=True),
                ):
                    return self._run(logits_CW, *wanted)
            except refusals as error:  # before any of it has run
                said = " ".join(str(error).split()).partition(" Set TORCHDYNAMO")[0][:200]
                log.warning(
                    "train.compile: torch cannot compile the loss, it runs uncompiled: %s", said
                )
                self._is_refused = True
        return self._plain(logits_CW, *wanted)


@cache  # what one training has compiled, another of the process finds
def compiled_loss(loss: RowLoss, backend: Any = "inductor") -> RowLoss:
    """Return a loss that torch compiles at its first call."""
    return _Compiled(loss, backend)
