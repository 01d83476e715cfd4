"""Near ties: does rounding alone explain that tree decoding and plain decoding differ?

In float32 tree decoding and plain decoding say the same tokens. In lower precision the logits of a
token depend on how many tokens are run beside it, so that two tokens that nearly tie may change
places. That is the only difference that is allowed, and it can be measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.recurrent import StateCache, is_recurrent, one_by_one
from medusa_exp.model.backbone import Backbone

_WINDOW = 32
"""Tokens over which the noise is measured: at a single one it may be nothing by chance."""


@dataclass(frozen=True)
class Difference:
    """Where two responses to a prompt part."""

    position: int
    """Tokens that they have in common."""
    margin: float
    """Plain decoding's logit of its own token, less that of the other response's."""
    noise: float
    """Largest difference of any logit, there and shortly before, between running the same tokens
    one at a time, several at a time, and beside guesses."""
    is_near_tie: bool
    """Is the margin at most twice the noise? Each of the two logits may move by as much."""


@torch.inference_mode()
def find_difference(
    backbone: Backbone, prompt: list[int], plain: list[int], other: list[int], num_nodes: int
) -> Difference | None:
    """Look at the first token that differs; None where the responses are the same.

    Args:
        backbone: the model that gave both.
        prompt: token ids.
        plain: the response decoded one token at a time.
        other: the response decoded over a tree.
        num_nodes: tokens that the tree has run at a time.
    """
    if plain == other:
        return None
    shorter = min(len(plain), len(other))
    position = next((i for i in range(shorter) if plain[i] != other[i]), shorter)
    if position == shorter:  # one goes on where the other has stopped
        return Difference(position, float("inf"), 0.0, False)
    prefix = prompt + plain[:position]
    single_WV = _last_logits(backbone, prefix, 1)
    others = [_last_logits(backbone, prefix, n) for n in (num_nodes, len(prefix))]
    if not is_recurrent(backbone):  # whose drafts have no siblings
        others.append(_last_logits(backbone, prefix, 1, num_siblings=num_nodes - 1))
    margin = float(single_WV[-1, plain[position]] - single_WV[-1, other[position]])
    noise = max(float((single_WV - other_WV).abs().max()) for other_WV in others)
    return Difference(position, margin, noise, margin <= 2 * noise)


def _last_logits(
    backbone: Backbone, ids: list[int], at_a_time: int, num_siblings: int = 0
) -> Tensor:
    """Return logits_WV after the last W tokens, run so many at a time as a step over a tree is.

    `num_siblings` copies of a token run beside it and are dropped again, as guesses are.
    """
    if is_recurrent(backbone):
        return _last_logits_by_state(backbone, ids, at_a_time)
    device = backbone.device
    ids_1T = torch.tensor([ids], device=device)
    start = 0 if at_a_time >= len(ids) else max(0, len(ids) - _WINDOW)
    capacity = len(ids) + num_siblings
    cache, mask = GrowingCache(backbone.num_layers, capacity, 1), StepMask(backbone.model, capacity)
    if start:
        backbone.forward(ids_1T[:, :start], cache, keep=torch.tensor([0], device=device))
    cache.set_lengths([start])
    logits = []
    while start < len(ids):
        count = min(at_a_time, len(ids) - start)
        step_1N = ids_1T[:, start : start + count]
        place_N = torch.arange(count + num_siblings, device=device)
        depth_N = place_N.clamp(max=count - 1)
        # A sibling sees the step's tokens and itself, and nobody sees a sibling.
        is_self_NN = torch.eye(len(place_N), dtype=torch.bool, device=device)
        sees_NN = ((place_N <= place_N[:, None]) & (place_N < count)) | is_self_NN
        logits_1NV, _ = backbone.forward(
            torch.cat([step_1N, step_1N[:, -1:].expand(-1, num_siblings)], dim=1),
            cache,
            mask=mask.at([start], sees_NN[None], depth_N[None]),
            position_ids_BN=start + depth_N[None],
        )
        start += count
        cache.set_lengths([start])
        logits.append(logits_1NV[0, :count].float())
    return torch.cat(logits)[-_WINDOW:]


def _last_logits_by_state(backbone: Backbone, ids: list[int], at_a_time: int) -> Tensor:
    """Return the same of a model with recurrent layers, run so many at a time as a chain is."""
    ids_1T = torch.tensor([ids], device=backbone.device)
    cache = StateCache(backbone.model)
    if at_a_time >= len(ids):
        return backbone.forward(ids_1T, cache)[0][0, -_WINDOW:].float()
    start = max(1, len(ids) - _WINDOW)
    logits = [backbone.forward(ids_1T[:, :start], cache)[0][0]]
    for step_1N in ids_1T[:, start:].split(at_a_time, 1):
        with one_by_one(backbone, cache, 0):
            logits.append(backbone.forward(step_1N, cache)[0][0])
    return torch.cat(logits)[-_WINDOW:].float()
