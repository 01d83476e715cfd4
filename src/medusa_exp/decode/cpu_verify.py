"""Verification on a CPU: a walk down from the root, which looks at the nodes it comes to alone.

The specification, `decode/verify.py`, asks the same of every node, in few and large operations, and
waits for nothing: as a GPU wants it. In the host's memory it is cheaper to see where a path ends.
Greedily that is one pass over Python lists. Where tokens are drawn, probabilities are computed of
the two or three nodes that are come to, of which one is the path's end, and a token is looked for
among sums of blocks. Of nine nodes of 262,144 logits that took 0.5 ms in place of 9.5, and 1.3 in
place of 17 where drafts were drawn (two cores); numbers decide what they decide in `verify`.

B rows of a batch, O rows whose walk goes on, N tree nodes, C most children of the nodes where these
stand, V vocabulary, W tokens that heads can propose, X = V, or W and all others as one, K blocks of
S tokens, L path length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa_exp.decode.sampled import Drawn, Rejection
from medusa_exp.decode.verify import Verdict, check_rule, probabilities, verify
from medusa_exp.model.argmax import argmax

_BLOCK = 256
"""Some thousandth of a vocabulary."""
Chosen = list[tuple[int, int]]
"""For each of O rows the child that is accepted, or -1, and then the token that ends the path."""


def verify_on_cpu(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor,
    *,
    rule: str = "greedy",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniforms_BN: Tensor | None = None,
    max_depth: int | None = None,
    drawn: Drawn | None = None,
    **options: Any,
) -> Verdict:
    """Find the path of accepted draft tokens; arguments and errors are those of `verify`."""
    check_rule(rule, temperature, uniforms_BN)
    width = 1 + (tokens_BN.shape[1] - 1 if max_depth is None else max_depth)
    if rule == "greedy":
        return _greedy(logits_BNV, tokens_BN, parents_BN, width)
    if rule == "sampling":
        assert uniforms_BN is not None
        choose = _Draws(logits_BNV, tokens_BN, uniforms_BN, (temperature, top_k, top_p), drawn)
        return _walk(tokens_BN, parents_BN, width, choose)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return verify(logits_BNV, tokens_BN, parents_BN, rule=rule, max_depth=max_depth, **options)


def _greedy(logits_BNV: Tensor, tokens_BN: Tensor, parents_BN: Tensor, width: int) -> Verdict:
    targets = argmax(logits_BNV).tolist()
    paths, last_tokens = [], []
    for target, tokens, parents in zip(
        targets, tokens_BN.tolist(), parents_BN.tolist(), strict=True
    ):
        path, at = [0], 0
        # Parents stand before children, and of equal siblings the first counts: one pass will do.
        for node in range(1, len(tokens)):
            if parents[node] == at and tokens[node] == target[at]:
                path.append(node)
                at = node
        paths.append(path)
        last_tokens.append(target[at])
    return _verdict(paths, last_tokens, width)


def _verdict(paths: list[list[int]], last_tokens: list[int], width: int) -> Verdict:
    return Verdict(
        torch.tensor([path + [-1] * (width - len(path)) for path in paths]),
        torch.tensor([len(path) - 1 for path in paths]),
        torch.tensor(last_tokens),
    )


def _walk(
    tokens_BN: Tensor,
    parents_BN: Tensor,
    width: int,
    choose: Callable[[list[int], list[int], list[list[int]]], Chosen],
) -> Verdict:
    """Take all rows down from their roots, one depth after the other.

    choose: of rows, the nodes where they stand, and the children of these.
    """
    parents = parents_BN.tolist()
    paths: list[list[int]] = [[0] for _ in parents]
    last_tokens = [0] * len(parents)
    rows = list(range(len(parents)))
    while rows:
        at = [paths[row][-1] for row in rows]
        children = [
            [child for child in range(node + 1, len(parents[row])) if parents[row][child] == node]
            for row, node in zip(rows, at, strict=True)
        ]
        still = []
        for row, (child, token) in zip(rows, choose(rows, at, children), strict=True):
            if child < 0:
                last_tokens[row] = token
            else:
                paths[row].append(child)
                still.append(row)
        rows = still
    return _verdict(paths, last_tokens, width)


class _Draws:
    """Chooses by one number a node, as the rule sampling says."""

    def __init__(
        self,
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        uniforms_BN: Tensor,
        filters: tuple[float, int | None, float | None],
        drawn: Drawn | None,
    ) -> None:
        self._logits_BNV, self._tokens_BN, self._filters = logits_BNV, tokens_BN, filters
        self._uniforms_BN, self._drawn = uniforms_BN, drawn

    def __call__(self, rows: list[int], at: list[int], children: list[list[int]]) -> Chosen:
        """Choose; see `_walk`."""
        all_at_root = len(rows) == len(self._logits_BNV) and not any(at)
        logits_OV = self._logits_BNV[:, 0] if all_at_root else self._logits_BNV[rows, at]
        p_OV = probabilities(logits_OV, *self._filters)
        if not any(children):
            chosen, rest_OV, places = [-1] * len(rows), p_OV, self._uniforms_BN[rows, at]
        elif self._drawn is None:
            chosen, rest_OV, places = self._of_given(p_OV, rows, at, children)
        else:
            chosen, rest_OV, places = self._of_drawn(p_OV, rows, at, children)
        ended = [o for o, child in enumerate(chosen) if child < 0]
        tokens = [-1] * len(rows)
        if ended:
            part = slice(None) if len(ended) == len(rows) else ended
            found = token_at(rest_OV[part], places[part], p_OV[part])
            for o, token in zip(ended, found, strict=True):
                tokens[o] = token
        return list(zip(chosen, tokens, strict=True))

    def _of_given(
        self, p_OV: Tensor, rows: list[int], at: list[int], children: list[list[int]]
    ) -> tuple[list[int], Tensor, Tensor]:
        """Return the children that are accepted, and where none is, weights and a place in them.

        The children's tokens come first in the order of the draw, and of copies one.
        """
        tokens_BN = self._tokens_BN.tolist()
        tokens = [
            [tokens_BN[row][child] for child in some]
            for row, some in zip(rows, children, strict=True)
        ]
        most = max(map(len, tokens))
        padded_OC = torch.tensor([some + [0] * (most - len(some)) for some in tokens])
        p_by_row = p_OV.gather(1, padded_OC).tolist()
        uniforms = self._uniforms_BN[rows, at].tolist()
        chosen, places, rest_OV = [-1] * len(rows), [], p_OV.clone()
        for o, (some, own) in enumerate(zip(children, tokens, strict=True)):
            end = 0.0
            for child, token, p, place in zip(some, own, p_by_row[o], range(most), strict=False):
                if token in own[:place]:
                    continue
                end += p
                if p > 0 and uniforms[o] < end:
                    chosen[o] = child
                    break
            places.append(uniforms[o] - end)
            rest_OV[o, own] = 0.0
        return chosen, rest_OV, torch.tensor(places, dtype=torch.float64)

    def _of_drawn(
        self, p_OV: Tensor, rows: list[int], at: list[int], children: list[list[int]]
    ) -> tuple[list[int], Tensor, Tensor]:
        """Return the same of children that were drawn, which are tried one after the other."""
        assert self._drawn is not None
        row_O, at_O = torch.tensor(rows), torch.tensor(at)
        q_OW = self._drawn.q_BQW[row_O, self._drawn.row_N[at_O]].to(p_OV.dtype)
        token_map = self._drawn.token_map
        p_OX, place_V = p_OV, None
        if token_map is not None:
            number = len(token_map)
            # All that heads cannot propose is one token more.
            p_OW, q_OW = p_OV[:, token_map], pad(q_OW, (0, 1))
            p_OX = torch.cat([p_OW, p_OV.sum(-1, True) - p_OW.sum(-1, True)], -1).clamp(min=0)
            place_V = torch.full(p_OV.shape[1:], number)
            place_V[token_map] = torch.arange(number)
        left = Rejection(p_OX, q_OW)
        uniform_O1 = self._uniforms_BN[row_O, at_O][:, None].to(p_OV.dtype)
        child_OC = self._drawn.children_NC[at_O]
        chosen_O1 = torch.full_like(row_O, -1)[:, None]
        for child_O1 in child_OC[:, : max(map(len, children))].split(1, dim=1):
            token_O1 = self._tokens_BN[row_O[:, None], child_O1.clamp(min=0)]
            left.attempt(token_O1 if place_V is None else place_V[token_O1], child_O1 >= 0)
            is_hit_O1 = (chosen_O1 < 0) & (child_O1 >= 0) & (uniform_O1 < 1 - left.open)
            chosen_O1 = torch.where(is_hit_O1, child_O1, chosen_O1)
        rest_OV = left.rest()
        if token_map is not None:
            rest_OV = p_OV.index_copy(1, token_map, rest_OV[:, :-1])
        # What is left of the number is uniform again.
        place_O1 = ((uniform_O1 - (1 - left.open)) / left.open).nan_to_num(nan=0.0).clamp(0, 1)
        place_O1 = place_O1 * rest_OV.sum(-1, keepdim=True)
        return chosen_O1[:, 0].tolist(), rest_OV, place_O1[:, 0]


def token_at(weights_RV: Tensor, places_R: Tensor, p_RV: Tensor) -> list[int]:
    """Return the token of each row with whose weight the sum first lies above a place.

    Rounding may leave a place behind them all: then the last token that has a weight. If none has
    any, p's likeliest.
    """
    size = weights_RV.shape[1]
    if missing := -size % _BLOCK:
        weights_RV = pad(weights_RV, (0, missing))
    blocks_RKS = weights_RV.unflatten(1, (-1, _BLOCK))
    place_R1 = places_R.double()[:, None]
    block_R, before_R1 = _first_above(blocks_RKS.sum(-1), place_R1)
    row_R = torch.arange(len(weights_RV))
    inner_R, _ = _first_above(blocks_RKS[row_R, block_R], place_R1, before_R1)
    tokens = (block_R * _BLOCK + inner_R).tolist()
    for row in (weights_RV[row_R, block_R * _BLOCK + inner_R] <= 0).nonzero()[:, 0].tolist():
        tokens[row] = int(argmax(p_RV[row]))
    return tokens


def _first_above(
    weights_RX: Tensor, place_R1: Tensor, before_R1: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the entry [R] with which the sum, begun before, first lies above a place, and the sum
    before it [R, 1]; of entries with a weight the last, where none does."""
    ends_RX = weights_RX.double().cumsum(-1) + before_R1
    found_R1 = torch.searchsorted(ends_RX, place_R1.contiguous(), right=True)
    numbers_X = torch.arange(weights_RX.shape[1])
    final_R1 = (numbers_X * (weights_RX > 0)).amax(-1, keepdim=True)
    found_R1 = found_R1.minimum(final_R1)
    starts_R1 = ends_RX.gather(1, (found_R1 - 1).clamp(min=0))
    return found_R1[:, 0], torch.where(found_R1 > 0, starts_R1, place_R1.new_zeros(()) + before_R1)
