"""The Medusa loss: targets, labels of each head, chunks of logits, weights of heads, schedule.

    loss = sum_k head_decay^k * CE(head_k(h_t), y_{t+1+k})        k from 1, mean over labelled t

h_t is the backbone's last hidden state at position t. The backbone's own lm_head says y_{t+1}, and
head k the k-th token after that. (Medusa, Cai et al. 2024, equation 1; head_decay^k is lambda_k,
and the config's `train.decay` is head_decay.) y is the text's token or the backbone's argmax
(teacher labels); instead of cross entropy there may be the divergence from the backbone's
distribution, or what falls as more tokens are accepted that are sampled from the head's
(`row_loss.py`). The logits of all heads never exist at once.

`head` counts from 1, as labels and metrics do (0 is the lm_head); `k` in code is an index, from 0,
as the heads themselves do.

B batch, T time, D hidden, V vocabulary, W tokens of the head vocabulary (V, or fewer of them), K
heads, R labelled rows of one head, C rows of a chunk, J draft tokens, or likeliest tokens.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from medusa_exp.config import TrainConfig
from medusa_exp.data.batching import labeled_index
from medusa_exp.data.datamodule import Batch
from medusa_exp.model.argmax import argmax
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.model.row_loss import (
    AcceptanceLoss,
    Divergence,
    RowLoss,
    TopAcceptance,
    compiled_loss,
)
from medusa_exp.model.targets import (
    ROWS,
    FromHidden,
    Targets,
    TeacherTargets,
    TokenTargets,
    TopTargets,
    kept_rows,
)
from medusa_exp.model.teacher_forcing import teacher_forced

ROW_STEP = 256
"""Rows of a chunk are a multiple of this, where there may be more: few shapes, little padding."""
ChunkLoss = tuple[Tensor, Tensor | None]
"""The loss of some rows, summed, and what is accepted of each, where that is known."""


@dataclass(frozen=True)
class Objective:
    """What is minimized: the keys of the config's section `train` that say so; see there."""

    loss: str = "ce"
    labels: str = "teacher"
    top_k: int = 16
    teacher: str = "full"
    lk_decay: float = 10.0
    head_weights: str = "decay"
    decay: float = 0.8
    coefficient: float = 1.0
    coefficient_schedule: str = "constant"
    loss_chunk_rows: int = 256
    loss_form: str = "recompute"
    is_compiled: bool = False
    """Does torch compile the loss of a row?"""

    @classmethod
    def of(cls, settings: TrainConfig) -> "Objective":
        """Return what the section `train` asks for, in which nothing is automatic any more."""
        assert settings.loss_chunk_rows is not None
        assert "auto" not in (settings.loss, settings.head_weights, settings.loss_form)
        keys = [field.name for field in fields(cls) if field.name != "is_compiled"]
        return cls(**{key: getattr(settings, key) for key in keys})

    @property
    def measures_acceptance(self) -> bool:
        """Is it known at each step what is accepted of the heads' drafts?"""
        return self.head_weights == "acceptance" or self.loss in ("tv", "nla", "lk")

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
        targets = self._targets(backbone, heads, hidden_BTD, batch)
        if self.is_compiled:
            targets.loss = compiled_loss(targets.loss)
        return targets

    def _targets(
        self, backbone: Backbone, heads: MedusaHeads, hidden_BTD: Tensor, batch: Batch
    ) -> Targets:
        if self.loss == "ce":
            return TokenTargets(heads.to_head_vocab(self.labels_of(backbone, hidden_BTD, batch)))

        def next_logits(hidden_RD: Tensor) -> Tensor:
            return heads.from_head_vocab(backbone.next_logits(hidden_RD))

        def head_vocab_probs(hidden_RD: Tensor) -> Tensor:
            return next_logits(hidden_RD).softmax(-1, torch.float32)

        def next_probs(hidden_RD: Tensor) -> Tensor:
            probs_RV = backbone.next_logits(hidden_RD).softmax(-1, torch.float32)
            return heads.from_head_vocab(probs_RV)

        def next_log_probs(hidden_RD: Tensor) -> Tensor:
            log_probs_RV = backbone.next_logits(hidden_RD).log_softmax(-1, torch.float32)
            return heads.from_head_vocab(log_probs_RV)

        index_R = batch.labeled[0]

        def teacher(probabilities: FromHidden, loss: RowLoss) -> Targets:
            most = kept_rows(hidden_BTD.device, heads.config.head_vocab_size)
            kept_R = index_R if len(index_R) <= most else None
            return TeacherTargets(hidden_BTD, probabilities, loss, kept_R)

        if self.loss == "kl":
            return teacher(head_vocab_probs, Divergence(self.measures_acceptance))
        if self.loss == "topk_kl":
            return TopTargets(hidden_BTD, index_R, next_logits, self.top_k)
        loss = AcceptanceLoss(self.loss, self.lk_decay)
        if self.teacher == "full":
            return teacher(next_probs, loss)
        return TopTargets(hidden_BTD, index_R, next_log_probs, self.top_k, TopAcceptance(loss))

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
def teacher_argmax(next_logits: FromHidden, hidden_RD: Tensor) -> Tensor:
    """Return the likeliest next token at each of these hidden states: tokens_R."""
    chunks = [argmax(next_logits(hidden_CD)) for hidden_CD in hidden_RD.split(ROWS)]
    return torch.cat(chunks)


@dataclass
class HeadLoss:
    """One head's loss on one batch, summed over its R labelled positions."""

    loss_sum: Tensor
    num_labels: int
    reached_sum: Tensor | None = None
    """Where asked for: positions at which the draft tokens of this head and of all before it are
    accepted, expected, if each head draws its own."""


def medusa_losses(
    heads: MedusaHeads,
    hidden_BTD: Tensor,
    targets: Targets,
    labeled: Sequence[Tensor],
    input_ids_BT: Tensor,
    *,
    chunk_rows: int,
    any_labeled: Tensor | None = None,
    form: str = "recompute",
    sees_own_drafts: bool = False,
    measures_acceptance: bool = False,
) -> list[HeadLoss]:
    """Compute every head's loss, summed, in nats.

    Only labelled rows are projected, and at most `chunk_rows` x W logits exist at once.

    Args:
        heads: of any family.
        hidden_BTD: what they read: `heads_input` of the backbone's hidden states.
        targets: what they are to predict, in the head vocabulary.
        labeled: index_R of the lm_head and of each head, see `Batch`.
        input_ids_BT: the text, which heads see that see tokens.
        chunk_rows: C.
        any_labeled: index_U of all heads together, at which recurrent ones are unrolled, and
            rooted ones see the root.
        form: recompute or at_once, see `loss_and_acceptance`.
        sees_own_drafts: sequential heads see, in place of the text, what they draft themselves.
        measures_acceptance: fill in `reached_sum`.
    """
    results = []
    # At each position the product of the acceptances so far: heads err at the same positions, and
    # a product of their means would miss that.
    reached_I = torch.ones_like(input_ids_BT, dtype=torch.float32).flatten()  # I = B * T
    of_heads = teacher_forced(
        heads,
        hidden_BTD,
        input_ids_BT,
        labeled,
        any_labeled,
        chunk_rows=chunk_rows,
        sees_own_drafts=sees_own_drafts,
        recomputes=form == "recompute",
    )
    for k, inputs in zip(range(heads.num_heads), of_heads, strict=True):
        index_R = labeled[k + 1]
        # The head at index k is head k+1: at t it predicts what follows token t+k+1.
        wanted = targets.at(index_R + k + 1)
        parameters = inputs.parameters if form == "at_once" else ()
        loss_sum, accepted_R = loss_and_acceptance(
            inputs.logits_of, targets, inputs.rows, wanted, chunk_rows, parameters
        )
        result = HeadLoss(loss_sum, len(index_R))
        if measures_acceptance:
            assert accepted_R is not None
            reached_R = reached_I[index_R] * accepted_R
            reached_I = reached_I.index_copy(0, index_R, reached_R)
            result.reached_sum = reached_R.sum()
        results.append(result)
    return results


def head_labels(
    input_ids_BT: Tensor, is_trained_BT: Tensor, example_BT: Tensor, head: int
) -> tuple[Tensor, Tensor]:
    """Return (index_R, labels_R) of a head: its label at t is token t+1+head."""
    index_R = labeled_index(is_trained_BT, example_BT, head)
    return index_R, input_ids_BT.flatten()[index_R + 1 + head]


def medusa_loss(
    losses: list[HeadLoss],
    weights: float | Sequence[float | Tensor],
    totals: Sequence[int | Tensor] | None = None,
) -> Tensor:
    """Return the sum over heads of a weight times the head's mean loss (Medusa, equation 1).

    Args:
        losses: of the heads on a batch.
        weights: of the heads, the lambdas; or head_decay, whose powers they are.
        totals: what each head's sum is divided by, where this batch is a part of a larger one; by
            default its own labels. A head without a label contributes zero, not NaN.
    """
    if totals is None:
        totals = [loss.num_labels for loss in losses]
    if isinstance(weights, float):
        weights = decay_weights(weights, len(losses))
    terms = [
        weight * loss.loss_sum / at_least_one(total)
        for weight, loss, total in zip(weights, losses, totals, strict=True)
    ]
    return torch.stack(terms).sum()


def decay_weights(decay: float, num_heads: int) -> list[float]:
    """Return decay**head for each head, which counts from 1."""
    return [decay**head for head in range(1, num_heads + 1)]


def acceptance_weights(reached_K: Tensor, decay: float) -> Tensor:
    """Return weights_K of the heads by what each adds to the expected length of a draft.

    With alpha_k the acceptance of head k where all before it are accepted, a chain of drafts has
    the expected length L = sum_i prod_{j<=i} alpha_j, and

        dL / d log alpha_k = sum_{i>=k} prod_{j<=i} alpha_j

    a weighted sum of -log alpha_k with these weights falls as L rises. They are scaled to the sum
    of decay's powers, so that the same learning rate and clipping suit.

    Args:
        reached_K: the mean product of each head and those before it.
        decay: head_decay.
    """
    # No cumsum, of which CUDA has no deterministic one.
    gain_K = torch.stack([reached_K[k:].sum() for k in range(len(reached_K))])
    total = sum(decay_weights(decay, len(reached_K)))
    return gain_K * (total / gain_K.sum().clamp(min=torch.finfo(gain_K.dtype).tiny))


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
    any_labeled: Tensor | None = None,
) -> Tensor:
    """Return, for validation, counts_K4 in float64 where there is: loss summed in nats, and the
    numbers of labels that a head ranked first, that it ranked among its first five, and of all.

    A label outside the head vocabulary adds no loss, and is never hit.
    """
    device = hidden_BTD.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # which that has not
    counts_K4 = torch.zeros(heads.num_heads, 4, dtype=exact, device=device)
    labels_BT = heads.to_head_vocab(labels_BT)
    of_heads = teacher_forced(
        heads, hidden_BTD, input_ids_BT, labeled, any_labeled, chunk_rows=chunk_rows
    )
    for k, inputs in zip(range(heads.num_heads), of_heads, strict=True):
        labels_R = labels_BT.flatten()[labeled[k + 1] + 2 + k]
        chunks = [part.split(chunk_rows) for part in (labels_R, *inputs.rows)]
        for labels_C, *inputs_C in zip(*chunks, strict=True):
            logits_CW = inputs.logits_of(*inputs_C).float()
            hits_C5 = logits_CW.topk(5).indices == labels_C[:, None]
            loss = cross_entropy(logits_CW, labels_C, reduction="sum")
            labels = loss.new_full((), len(labels_C))
            counts_K4[k] += torch.stack([loss, hits_C5[:, 0].sum(), hits_C5.sum(), labels])
    return counts_K4


def loss_and_acceptance(
    logits_of: Callable[..., Tensor],
    targets: Targets,
    inputs: tuple[Tensor, ...],
    target_rows: tuple[Tensor, ...],
    chunk_rows: int,
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of all rows, summed, and each row's acceptance where the targets know it.

    Only some of the rows have logits at a time. Two forms of one thing: `recompute` computes each
    chunk's logits again in the backward pass; `at_once` computes each chunk's gradients with its
    loss, and keeps them for the backward pass: a quarter less to compute.

    Args:
        logits_of: from rows of `inputs` to logits_CW.
        targets: what the rows are to predict.
        inputs: tensors with a row each, which may want a gradient.
        target_rows: what `targets.at` has for these rows.
        chunk_rows: the most that C may be.
        parameters: all that `logits_of` trains, for the form at_once. Where there is none, logits
            are recomputed.
    """

    def chunk_loss(is_real_C: Tensor, *rows: Tensor) -> ChunkLoss:
        logits_CW = logits_of(*rows[: len(inputs)])
        losses_C, accepted_C = targets.loss(logits_CW, *targets.wanted(*rows[len(inputs) :]))
        return (losses_C * is_real_C).sum(), accepted_C

    # Every chunk has the same shape: each new one would cost the libraries a set-up of its own.
    number = len(inputs[0])
    chunk_rows = _even_rows(number, chunk_rows)
    missing = -number % chunk_rows or (chunk_rows if not number else 0)
    is_real_R = torch.ones(number, device=inputs[0].device)
    padded = [
        pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)).split(chunk_rows)
        for rows in (is_real_R, *inputs, *target_rows)
    ]
    chunks = zip(*padded, strict=True)
    if parameters:
        places = [place for place, rows in enumerate(inputs, 1) if rows.requires_grad]
        trained = (*(inputs[place - 1] for place in places), *parameters)
        loss, accepted_R = _AtOnce.apply(chunk_loss, chunks, places, *trained)
        return loss, accepted_R if accepted_R is None else accepted_R[:number]
    # Nothing here is drawn at random: there is no state to keep for the second time.
    again = partial(checkpoint, chunk_loss, use_reentrant=False, preserve_rng_state=False)
    losses, accepted = zip(*(again(*chunk) for chunk in chunks), strict=True)
    accepted_R = _joined(accepted)
    return torch.stack(losses).sum(), accepted_R if accepted_R is None else accepted_R[:number]


def _joined(accepted: Sequence[Tensor | None]) -> Tensor | None:
    known = [accepted_C for accepted_C in accepted if accepted_C is not None]
    return torch.cat(known) if known else None


def _even_rows(number: int, most: int) -> int:
    """Return the rows of chunks that are equally full: large ones would end in much padding."""
    step = min(most, ROW_STEP)
    rows = -(-number // max(1, -(-number // most)))
    return min(most, max(1, -(-rows // step)) * step)


class _AtOnce(torch.autograd.Function):
    """The sum of the chunks' losses, whose gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: Callable[..., ChunkLoss],
        chunks: Iterable[tuple[Tensor, ...]],
        places: Sequence[int],
        *trained: Tensor,
    ) -> ChunkLoss:
        """Sum losses and gradients over the chunks; gradients of inputs are put together.

        `trained`: the inputs that want a gradient, which are at these places of a chunk, and the
        parameters.
        """
        inputs, parameters = trained[: len(places)], trained[len(places) :]
        of_inputs: list[tuple[Tensor, ...]] = []
        losses: list[Tensor] = []
        accepted: list[Tensor | None] = []
        sums: list[Tensor] = []
        for rows in chunks:
            chunk = list(rows)
            for place in places:
                chunk[place] = chunk[place].detach().requires_grad_()
            with torch.enable_grad():
                loss, accepted_C = chunk_loss(*chunk)
            wanted = [*(chunk[place] for place in places), *parameters]
            all_gradients = torch.autograd.grad(loss, wanted)
            of_inputs.append(all_gradients[: len(places)])
            gradients = all_gradients[len(places) :]
            losses.append(loss.detach())
            accepted.append(accepted_C)
            if sums:
                torch._foreach_add_(sums, gradients)  # private: torch 2.13
            else:
                sums = [gradient.contiguous() for gradient in gradients]
        torch.clear_autocast_cache()  # else the next head finds this one's weights there too
        whole = zip(inputs, zip(*of_inputs, strict=True), strict=True)
        ctx.gradients = [*(torch.cat(parts)[: len(rows)] for rows, parts in whole), *sums]
        accepted_R = _joined(accepted)
        if accepted_R is not None:
            ctx.mark_non_differentiable(accepted_R)
        return torch.stack(losses).sum(), accepted_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, times that of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, grad_outputs[0])  # private: torch 2.13
        return (None, None, None, *gradients)
