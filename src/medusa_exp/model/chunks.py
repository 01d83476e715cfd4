"""The loss of many rows, of which only some have logits at a time. Two forms of one thing:

recompute    each chunk's logits are computed again in the backward pass
at_once      each chunk's gradients are computed with its loss, and kept for the backward pass: a
             quarter less to compute, but only for the heads' own parameters

C rows of a chunk, D hidden, W tokens that the heads know.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from medusa_exp.model.targets import Targets


def chunked_loss(
    logits_of: Callable[..., Tensor],
    targets: Targets,
    inputs: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    chunk_rows: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Return the loss of all rows, summed.

    Args:
        logits_of: from rows of `inputs` to logits_CW.
        targets: what the rows are to say.
        inputs: tensors with a row each.
        wanted: the rows of `targets`.
        chunk_rows: C.
        parameters: all that `logits_of` trains, for the form at_once. Where there is none, or a
            gradient of the inputs is wanted, logits are recomputed.
    """

    def chunk_loss(is_real_C: Tensor, *rows: Tensor) -> Tensor:
        logits_CW = logits_of(*rows[: len(inputs)]).float()  # they are bf16 under autocast
        return (targets.losses(logits_CW, *rows[len(inputs) :]) * is_real_C).sum()

    # Every chunk has the same shape: each new one would cost the libraries a set-up of its own.
    number = len(inputs[0])
    missing = -number % chunk_rows or (chunk_rows if not number else 0)
    is_real_R = torch.ones(number, device=inputs[0].device)
    padded = [
        pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)).split(chunk_rows)
        for rows in (is_real_R, *inputs, *wanted)
    ]
    chunks = zip(*padded, strict=True)
    if parameters and not any(rows.requires_grad for rows in inputs):
        return _AtOnce.apply(chunk_loss, chunks, *parameters)
    return torch.stack([checkpoint(chunk_loss, *c, use_reentrant=False) for c in chunks]).sum()


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
                torch._foreach_add_(sums, gradients)
            else:
                sums = [gradient.contiguous() for gradient in gradients]
        torch.clear_autocast_cache()  # else the next head finds this one's weights there too
        ctx.gradients = sums
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, times that of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, grad_outputs[0])
        return (None, None, *gradients)
