"""Distributions that tokens are drawn from: those of logits, and the token at a place in one.

V vocabulary, R rows, K blocks of S tokens, X one or the other.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa_exp.model.argmax import argmax, without_nan

Filters = tuple[float, int | None, float | None]
"""Temperature, top-k and top-p: what `probabilities` takes besides logits."""
_BLOCK = 256
"""About the root of a large vocabulary, 512 of 262,144: as many sums, as tokens in each."""


def probabilities(
    logits_V: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return probabilities over the last dimension, in float32 or wider.

    Temperature, then top-k, then top-p, as transformers applies them: of tokens that tie for place
    k all stay, and top-p keeps the token with which the sum reaches `top_p`. NaN counts as minus
    infinity; tokens of infinite logit share all the probability, and where none is above minus
    infinity, token 0 has it.
    """
    wide_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))
    below_V = _tempered(wide_V, temperature)
    if top_k is not None:
        kth_1 = below_V.topk(min(top_k, below_V.shape[-1]), dim=-1).values[..., -1:]
        below_V = below_V.masked_fill(below_V < kth_1, -torch.inf)
    if top_p is not None and top_p < 1:  # the sum of all may round to more than 1 before its end
        below_V = _nucleus(below_V, top_p)
    return below_V.softmax(-1)


def _tempered(logits_V: Tensor, temperature: float) -> Tensor:
    """Return logits over the temperature, and over a row any number more: no softmax sees that."""
    largest_1 = logits_V.amax(-1, keepdim=True)  # NaN, where there is one
    is_small = temperature < torch.finfo(logits_V.dtype).tiny  # 0 over it is NaN
    if logits_V.device.type == "cpu" and not is_small and bool(largest_1.isfinite().all()):
        return logits_V if temperature == 1 else (logits_V - largest_1).div_(temperature)
    logits_V = without_nan(logits_V)
    largest_1 = logits_V.amax(-1, keepdim=True)
    # Infinities of one sign are equal, and not NaN. Divided only then, or a tiny temperature would
    # make infinities of several logits.
    below_V = torch.where(logits_V == largest_1, 0.0, (logits_V - largest_1) / temperature)
    token_V = torch.arange(below_V.shape[-1], device=below_V.device)
    return below_V.masked_fill((largest_1 == -torch.inf) & (token_V > 0), -torch.inf)


def _nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    ordered_V, place_V = logits_V.sort(dim=-1, descending=True, stable=True)
    p_V = ordered_V.softmax(-1)
    is_out_V = p_V.cumsum(-1) - p_V >= top_p
    is_out_V[..., 0] = False
    return logits_V.masked_fill(is_out_V.gather(-1, place_V.argsort(-1)), -torch.inf)


def token_at(weights_RV: Tensor, place_R1: Tensor, p_RV: Tensor) -> Tensor:
    """Return the token [R] of each row with whose weight the sum first lies above a place.

    Sums are taken of blocks, and within one: fewer roundings than in a sum over all, and on a CPU
    less time. Rounding may still leave a place behind them all: then it is the last token that has
    a weight, and where none has any, p's likeliest.

    Args:
        weights_RV: of the tokens, of any sum.
        place_R1: from 0 to their sum.
        p_RV: the distribution that they are left of.
    """
    if missing := -weights_RV.shape[1] % _BLOCK:
        weights_RV = pad(weights_RV, (0, missing))
    blocks_RKS = weights_RV.unflatten(1, (-1, _BLOCK))
    exact = torch.float32 if place_R1.device.type == "mps" else torch.float64  # which that has not
    place_R1 = place_R1.to(exact).contiguous()
    block_R1, before_R1 = _first_above(blocks_RKS.sum(-1).to(exact), place_R1, 0.0)
    index_R1S = block_R1[..., None].expand(-1, 1, _BLOCK)
    inner_RS = blocks_RKS.gather(1, index_R1S)[:, 0].to(exact)
    inner_R1, _ = _first_above(inner_RS, place_R1, before_R1)
    token_R1 = block_R1 * _BLOCK + inner_R1
    has_weight_R1 = weights_RV.gather(1, token_R1) > 0
    return torch.where(has_weight_R1[:, 0], token_R1[:, 0], argmax(p_RV))


def _first_above(
    weights_RX: Tensor, place_R1: Tensor, before_R1: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the entry [R, 1] with which the sum, begun before, first lies above a place, and the
    sum before it; of entries with a weight the last, where none does."""
    ends_RX = weights_RX.cumsum(-1) + before_R1
    found_R1 = torch.searchsorted(ends_RX, place_R1, right=True)
    number_X = torch.arange(weights_RX.shape[1], device=weights_RX.device)
    final_R1 = (number_X * (weights_RX > 0)).amax(-1, keepdim=True)
    found_R1 = found_R1.minimum(final_R1)
    start_R1 = ends_RX.gather(1, (found_R1 - 1).clamp(min=0))
    return found_R1, torch.where(found_R1 > 0, start_R1, torch.zeros_like(start_R1) + before_R1)
