"""The Medusa loss: targets, labels of each head, chunks of logits, weights of heads, schedule.

    loss = sum_k head_decay^k * CE(head_k(h_t), y_{t+1+k})        k from 1, mean over labelled t

h_t is the backbone's last hidden state at position t. The backbone's own lm_head says y_{t+1}, and
head k the k-th token after that. (Medusa, Cai et al. 2024, equation 1; head_decay^k is lambda_k,
and the config's `train.decay` is head_decay.) y is the text's token or the backbone's argmax
(teacher labels); instead of cross entropy there may be the divergence from the backbone's
distribution, or what a draft token that is sampled from the head's has to be rejected for
(`acceptance_loss`). The logits of all heads never exist at once.

`head` counts from 1, as labels and metrics do (0 is the lm_head); `k` in code is an index, from 0,
as the heads themselves do.

B batch, T time, D hidden, V vocabulary, W tokens of the head vocabulary (V, or fewer of them), K
heads, R labelled rows of one head, C rows of a chunk, J draft tokens, or likeliest tokens.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, pad
from torch.utils.checkpoint import checkpoint

from medusa_exp.config import TrainConfig
from medusa_exp.data.batching import labeled_index
from medusa_exp.data.datamodule import Batch
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads

_ROW_STEP = 256
"""Rows of a chunk are a multiple of this, where there may be more: few shapes, little padding."""
_TINY = 1e-30
"""The least probability whose logarithm is taken: all of p may lie where no head can reach."""
_ROWS = 1024
"""Rows whose logits of the backbone exist at one time."""
NextLogits = Callable[[Tensor], Tensor]
"""From hidden_RD to the backbone's logits_RW of the head vocabulary."""


class Targets(Protocol):
    """What heads are to predict at a position: a token, or the backbone's distribution.

    What is large belongs into `losses`, which runs chunk by chunk, twice; what is small into `at`.
    """

    def at(self, index_R: Tensor) -> tuple[Tensor, ...]:
        """Return, with a row each, what follows the tokens at flat positions b * T + t."""
        ...

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return the loss of each of some rows of `at`, in nats."""
        ...


@dataclass(frozen=True)
class Objective:
    """What is minimized: the keys of the config's section `train` that say so; see there."""

    loss: str = "ce"
    labels: str = "teacher"
    top_k: int = 16
    teacher: str = "full"
    lk_decay: float = 10.0
    decay: float = 0.8
    coefficient: float = 1.0
    coefficient_schedule: str = "constant"
    chunk_rows: int = 256
    form: str = "recompute"

    @classmethod
    def of(cls, settings: TrainConfig) -> "Objective":
        """Return what the section `train` asks for, in which nothing is automatic any more."""
        assert settings.loss_chunk_rows is not None and settings.loss_form != "auto"
        return cls(
            loss=settings.loss,
            labels=settings.labels,
            top_k=settings.top_k,
            teacher=settings.teacher,
            lk_decay=settings.lk_decay,
            decay=settings.decay,
            coefficient=settings.coefficient,
            coefficient_schedule=settings.coefficient_schedule,
            chunk_rows=settings.loss_chunk_rows,
            form=settings.loss_form,
        )

    def labels_of(self, backbone: Backbone, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """Return labels_BT: at each trained position, the token that heads are to predict there."""
        if self.labels == "data":
            return batch.input_ids_BT
        if batch.teacher_BT is not None:
            return batch.teacher_BT
        return teacher_labels(backbone, hidden_BTD, batch)

    def targets(
        self, backbone: Backbone, heads: MedusaHeads, hidden_BTD: Tensor, batch: Batch
    ) -> Targets:
        """Return what the heads are to predict on a batch."""
        if self.loss == "ce":
            return TokenTargets(heads.to_head_vocab(self.labels_of(backbone, hidden_BTD, batch)))

        def next_logits(hidden_RD: Tensor) -> Tensor:
            return heads.from_head_vocab(backbone.next_logits(hidden_RD))

        def next_log_probs(hidden_RD: Tensor) -> Tensor:
            return heads.from_head_vocab(backbone.next_logits(hidden_RD).float().log_softmax(-1))

        if self.loss == "kl":
            return DistributionTargets(hidden_BTD, next_logits)
        index_R = batch.labeled[0]
        if self.loss == "topk_kl":
            return TopTargets(hidden_BTD, index_R, next_logits, self.top_k)
        form = AcceptanceLoss(self.loss, self.lk_decay)
        if self.teacher == "full":
            return AcceptanceTargets(hidden_BTD, next_log_probs, form)
        return TopAcceptanceTargets(hidden_BTD, index_R, next_log_probs, self.top_k, form)

    def factor(self, step: int, max_steps: int) -> float:
        """Return what the heads' loss is multiplied by at an optimizer step (from 0)."""
        progress = min(1.0, (step + 1) / max_steps)
        shares = {"constant": 1.0, "linear": progress, "sine": math.sin(0.5 * math.pi * progress)}
        return self.coefficient * shares[self.coefficient_schedule]


@torch.no_grad()
def teacher_labels(backbone: Backbone, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return labels_BT: in place of each trained token, the backbone's argmax there.

    Decoding compares draft tokens with this, not with the data: where a text takes a turn that the
    backbone would not take, its token is noise to the heads.
    """
    index_R = batch.labeled[0]
    hidden_RD = hidden_BTD.flatten(0, 1)[index_R]
    labels = batch.input_ids_BT.flatten().clone()
    labels[index_R + 1] = teacher_argmax(backbone.next_logits, hidden_RD)
    return labels.view_as(batch.input_ids_BT)


@torch.no_grad()
def teacher_argmax(next_logits: NextLogits, hidden_RD: Tensor) -> Tensor:
    """Return the likeliest next token at each of these hidden states: tokens_R."""
    chunks = [next_logits(hidden_CD).argmax(-1) for hidden_CD in hidden_RD.split(_ROWS)]
    return torch.cat(chunks)


@dataclass
class HeadLoss:
    """One head's loss on one batch, summed over its R labelled positions."""

    loss_sum: Tensor
    num_labels: int


def medusa_losses(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    targets: Targets,
    labeled: Sequence[Tensor],
    input_ids_BT: Tensor,
    *,
    chunk_rows: int,
    form: str = "recompute",
    sees_own_drafts: bool = False,
) -> list[HeadLoss]:
    """Compute every head's loss, summed, in nats.

    Only labelled rows are projected, and at most `chunk_rows` x W logits exist at once.

    Args:
        heads: of any family.
        hidden_BTD: what they read: `heads_input` of the backbone's hidden states.
        targets: what they are to predict, in the head vocabulary.
        labeled: index_R of the lm_head and of each head, see `Batch`.
        input_ids_BT: the text, which sequential heads see.
        chunk_rows: C.
        form: recompute or at_once, see `chunked_loss`.
        sees_own_drafts: sequential heads see, in place of the text, what they draft themselves.
    """
    results = []
    for k in range(heads.num_heads):
        index_R = labeled[k + 1]
        inputs = head_arguments(heads, k, index_R, hidden_BTD, input_ids_BT)
        if sees_own_drafts:
            inputs = with_own_drafts(heads, *inputs, chunk_rows=chunk_rows)
        # The head at index k is head k+1: at t it predicts what follows token t+k+1.
        wanted = targets.at(index_R + k + 1)
        logits_of = partial(heads.head_logits, k)
        parameters = heads.head_parameters(k) if form == "at_once" else ()
        loss_sum = chunked_loss(logits_of, targets, inputs, wanted, chunk_rows, parameters)
        results.append(HeadLoss(loss_sum, len(index_R)))
    return results


def head_arguments(
    heads: MedusaHeads, k: int, index_R: Tensor, hidden_BTD: Tensor, input_ids_BT: Tensor
) -> tuple[Tensor, ...]:
    """Return what `head_logits` takes besides k: (hidden_RD,), and draft_RJ if it is sequential.

    Such heads see the text's own tokens as their draft tokens. index_R: flat positions b * T + t.
    """
    hidden_RD = hidden_BTD.flatten(0, 1)[index_R]
    if not heads.is_sequential:
        return (hidden_RD,)
    next_J = torch.arange(1, k + 2, device=index_R.device)
    return hidden_RD, input_ids_BT.flatten()[index_R[:, None] + next_J]


@torch.no_grad()
def with_own_drafts(
    heads: MedusaHeads, hidden_RD: Tensor, drafted_RJ: Tensor, *, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Return (hidden_RD, drafted_RJ) with the heads' first choices in place of all but the root.

    Scheduled sampling (Bengio et al., arXiv 1506.03099) with the likeliest token.
    """
    chosen = []
    for hidden_CD, seen_CJ in zip(
        hidden_RD.split(chunk_rows), drafted_RJ[:, :1].split(chunk_rows), strict=True
    ):
        for k in range(drafted_RJ.shape[1] - 1):
            best_C = heads.head_logits(k, hidden_CD, seen_CJ).argmax(-1)
            token_C = best_C if heads.token_map is None else heads.token_map[best_C]
            seen_CJ = torch.cat([seen_CJ, token_C[:, None]], 1)
        chosen.append(seen_CJ)
    return hidden_RD, torch.cat(chosen)


def head_labels(
    input_ids_BT: Tensor, is_trained_BT: Tensor, example_BT: Tensor, head: int
) -> tuple[Tensor, Tensor]:
    """Return (index_R, labels_R) of a head: its label at t is token t+1+head."""
    index_R = labeled_index(is_trained_BT, example_BT, head)
    return index_R, input_ids_BT.flatten()[index_R + 1 + head]


def medusa_loss(
    losses: list[HeadLoss], decay: float, totals: Sequence[int | Tensor] | None = None
) -> Tensor:
    """Return the sum over heads of decay**head times its mean loss (Medusa, equation 1).

    Args:
        losses: of the heads on a batch.
        decay: head_decay, whose powers are the lambdas.
        totals: what each head's sum is divided by, where this batch is a part of a larger one; by
            default its own labels. A head without a label contributes zero, not NaN.
    """
    if totals is None:
        totals = [loss.num_labels for loss in losses]
    terms = [
        decay**head * loss.loss_sum / at_least_one(total)
        for head, (loss, total) in enumerate(zip(losses, totals, strict=True), 1)
    ]
    return torch.stack(terms).sum()


def at_least_one(total: int | Tensor) -> int | Tensor:
    """Return the larger of a count and 1; one that lies on the device is not read for it."""
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


@torch.no_grad()
def medusa_counts(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    labeled: Sequence[Tensor],
    input_ids_BT: Tensor,
    *,
    chunk_rows: int,
) -> Tensor:
    """Return, for validation, counts_K4 in float64: loss summed in nats, and the numbers of labels
    that a head ranked first, that it ranked among its first five, and of all.

    A label outside the head vocabulary adds no loss, and is never hit.
    """
    counts_K4 = torch.zeros(heads.num_heads, 4, dtype=torch.float64, device=hidden_BTD.device)
    labels_BT = heads.to_head_vocab(labels_BT)
    for k in range(heads.num_heads):
        index_R = labeled[k + 1]
        labels_R = labels_BT.flatten()[index_R + 2 + k]
        inputs = head_arguments(heads, k, index_R, hidden_BTD, input_ids_BT)
        chunks = [part.split(chunk_rows) for part in (labels_R, *inputs)]
        for labels_C, *inputs_C in zip(*chunks, strict=True):
            logits_CW = heads.head_logits(k, *inputs_C).float()
            hits_C5 = logits_CW.topk(5).indices == labels_C[:, None]
            loss = cross_entropy(logits_CW, labels_C, reduction="sum")
            labels = loss.new_full((), len(labels_C))
            counts_K4[k] += torch.stack([loss, hits_C5[:, 0].sum(), hits_C5.sum(), labels])
    return counts_K4


class TokenTargets:
    """Cross entropy with a token."""

    def __init__(self, labels_BT: Tensor) -> None:
        """Take, at each position, the token to be predicted there."""
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
            for rows_RD in hidden_ID[index_R].split(_ROWS):
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

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return KL(truncated backbone || head) of each row."""
        tokens_CJ, log_probs_CJ = rows
        head_CJ = logits_CW.gather(1, tokens_CJ) - logits_CW.logsumexp(-1, keepdim=True)
        return (log_probs_CJ.exp() * (log_probs_CJ - head_CJ)).sum(-1)


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

    def of(self, log_p_CX: Tensor, log_q_CX: Tensor) -> Tensor:
        """Return the loss of each row, of probabilities as logarithms."""
        p_CX = log_p_CX.exp()
        alpha_C = torch.minimum(p_CX, log_q_CX.exp()).sum(-1)
        return self.mix(alpha_C, self.share(alpha_C), self._kl(p_CX, (p_CX * log_q_CX).sum(-1)))

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

    def of_logits(self, log_p_CW: Tensor, logits_CW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, and its gradient by the logits [C, W].

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
        return self.mix(alpha_C, share_C, kl_C), gradient_CW

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
    def forward(ctx: Any, logits_CW: Tensor, log_p_CW: Tensor, form: AcceptanceLoss) -> Tensor:
        """Return the loss of each row."""
        loss_C, gradient_CW = form.of_logits(log_p_CW, logits_CW)
        ctx.save_for_backward(gradient_CW)
        return loss_C

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

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return the loss of each row."""
        with torch.no_grad():
            log_p_CW = self.next_log_probs(rows[0])
        loss_C: Tensor = _ByLogits.apply(logits_CW, log_p_CW, self.form)
        return loss_C


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

    def losses(self, logits_CW: Tensor, *rows: Tensor) -> Tensor:
        """Return the loss of each row."""
        tokens_CJ, log_p_CJ = rows
        log_q_CJ = logits_CW.gather(1, tokens_CJ) - logits_CW.logsumexp(-1, keepdim=True)
        return self.form.of(log_p_CJ, log_q_CJ)


def chunked_loss(
    logits_of: Callable[..., Tensor],
    targets: Targets,
    inputs: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    chunk_rows: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Return the loss of all rows, summed; only some of them have logits at a time.

    Two forms of one thing: `recompute` computes each chunk's logits again in the backward pass;
    `at_once` computes each chunk's gradients with its loss, and keeps them for the backward pass: a
    quarter less to compute, but only for the heads' own parameters.

    Args:
        logits_of: from rows of `inputs` to logits_CW.
        targets: what the rows are to predict.
        inputs: tensors with a row each.
        wanted: the rows of `targets`.
        chunk_rows: the most that C may be.
        parameters: all that `logits_of` trains, for the form at_once. Where there is none, or a
            gradient of the inputs is wanted, logits are recomputed.
    """

    def chunk_loss(is_real_C: Tensor, *rows: Tensor) -> Tensor:
        logits_CW = logits_of(*rows[: len(inputs)]).float()  # they are bf16 under autocast
        return (targets.losses(logits_CW, *rows[len(inputs) :]) * is_real_C).sum()

    # Every chunk has the same shape: each new one would cost the libraries a set-up of its own.
    number = len(inputs[0])
    chunk_rows = _even_rows(number, chunk_rows)
    missing = -number % chunk_rows or (chunk_rows if not number else 0)
    is_real_R = torch.ones(number, device=inputs[0].device)
    padded = [
        pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)).split(chunk_rows)
        for rows in (is_real_R, *inputs, *wanted)
    ]
    chunks = zip(*padded, strict=True)
    if parameters and not any(rows.requires_grad for rows in inputs):
        return _AtOnce.apply(chunk_loss, chunks, *parameters)
    # Nothing here is drawn at random: there is no state to keep for the second time.
    again = partial(checkpoint, chunk_loss, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(*chunk) for chunk in chunks]).sum()


def _even_rows(number: int, most: int) -> int:
    """Return the rows of chunks that are equally full: large ones would end in much padding."""
    step = min(most, _ROW_STEP)
    rows = -(-number // max(1, -(-number // most)))
    return min(most, max(1, -(-rows // step)) * step)


class _AtOnce(torch.autograd.Function):
    """The sum of the chunks' losses, whose gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: Callable[..., Tensor],
        chunks: Iterable[tuple[Tensor, ...]],
        *parameters: Tensor,
    ) -> Tensor:
        """Sum losses and gradients over the chunks."""
        losses: list[Tensor] = []
        sums: list[Tensor] = []
        for chunk in chunks:
            with torch.enable_grad():
                loss = chunk_loss(*chunk)
            gradients = torch.autograd.grad(loss, parameters)
            losses.append(loss.detach())
            if sums:
                torch._foreach_add_(sums, gradients)  # private: torch 2.13
            else:
                sums = [gradient.contiguous() for gradient in gradients]
        torch.clear_autocast_cache()  # else the next head finds this one's weights there too
        ctx.gradients = sums
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, times that of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, grad_outputs[0])  # private: torch 2.13
        return (None, None, *gradients)
