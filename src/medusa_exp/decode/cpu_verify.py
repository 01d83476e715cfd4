"""Verification on a CPU: a walk down from the root, which looks at the nodes it comes to alone.

The specification, `decode/verify.py`, asks the same of every node, in few and large operations, and
waits for nothing: as a GPU wants it. In the host's memory it is cheaper to see where a path ends.
Greedily that is one pass over Python lists. Where the next token is drawn, probabilities are
computed of the two or three nodes that are come to: of nine nodes of 262,144 logits in 0.5 ms, for
which the specification takes 9.5 (two cores). Of few rows, paths of drafts that were drawn are
judged one row at a time, in a third to two thirds of the time of `decode/traversal.py`, which
visits all nodes. Numbers decide what they decide there. The rule `typical`, which asks all nodes,
is left to the specification.

B rows of a batch, O rows whose paths go on, E that end, N tree nodes, V vocabulary, Q distributions
of W tokens that heads can propose.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.distribution import Filters, probabilities, token_at
from medusa_exp.decode.sampled import Drawn
from medusa_exp.decode.verify import Verdict, check_rule, verify
from medusa_exp.model.argmax import argmax

_FEW_ROWS = 3
"""Of 8 rows and more the operations of all at once are as fast, and threads share them."""


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
    length = tokens_BN.shape[1] if max_depth is None else 1 + max_depth
    if rule == "greedy":
        return _greedy(logits_BNV, tokens_BN, parents_BN, length)
    if rule == "sampling":
        assert uniforms_BN is not None
        trees = logits_BNV, tokens_BN, parents_BN, uniforms_BN
        filters = temperature, top_k, top_p
        if drawn is None:
            return _sampling(*trees, filters, length)
        if len(tokens_BN) <= _FEW_ROWS:
            return _traversal(*trees, filters, drawn, length)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "drawn": drawn}
    options |= {"uniforms_BN": uniforms_BN, "max_depth": max_depth}
    return verify(logits_BNV, tokens_BN, parents_BN, rule=rule, **options)


def _greedy(logits_BNV: Tensor, tokens_BN: Tensor, parents_BN: Tensor, length: int) -> Verdict:
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
    return _verdict(paths, last_tokens, length)


def _sampling(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor,
    uniforms_BN: Tensor,
    filters: Filters,
    length: int,
) -> Verdict:
    """Go down one depth after the other, with all rows whose paths go on."""
    tokens, parents = tokens_BN.tolist(), parents_BN.tolist()
    paths: list[list[int]] = [[0] for _ in tokens]
    last_tokens = [0] * len(tokens)
    rows = list(range(len(tokens)))
    while rows:
        at = [paths[row][-1] for row in rows]
        # All are at the root at first: a view of their logits does, and picking would copy them.
        is_start = len(rows) == len(tokens) and not any(at)
        logits_OV = logits_BNV[:, 0] if is_start else logits_BNV[rows, at]
        p_OV = probabilities(logits_OV, *filters)
        places = uniforms_BN[rows, at].tolist()
        rest_OV, ended = p_OV, []
        for o, (row, node) in enumerate(zip(rows, at, strict=True)):
            child_of: dict[int, int] = {}  # of copies the first
            for child in range(node + 1, len(tokens[row])):
                if parents[row][child] == node:
                    child_of.setdefault(tokens[row][child], child)
            if child_of:
                taken = list(child_of)
                chosen, places[o] = _first_child(p_OV[o, taken].tolist(), places[o])
                if chosen is not None:
                    paths[row].append(child_of[taken[chosen]])
                    continue
                if rest_OV is p_OV:
                    rest_OV = p_OV.clone()
                rest_OV[o, taken] = 0.0
            ended.append(o)
        if ended:
            part = slice(None) if len(ended) == len(rows) else ended
            place_E1 = torch.tensor([places[o] for o in ended], dtype=torch.float64)[:, None]
            found = token_at(rest_OV[part], place_E1, p_OV[part])
            for o, token in zip(ended, found.tolist(), strict=True):
                last_tokens[rows[o]] = token
        done = set(ended)
        rows = [row for o, row in enumerate(rows) if o not in done]
    return _verdict(paths, last_tokens, length)


def _first_child(p_of_children: list[float], place: float) -> tuple[int | None, float]:
    """Return which child a place in [0, 1) falls on, and else the place behind them all."""
    for number, p in enumerate(p_of_children):
        if place < p:
            return number, place
        place -= p
    return None, place


def _traversal(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor,
    uniforms_BN: Tensor,
    filters: Filters,
    drawn: Drawn,
    length: int,
) -> Verdict:
    """Do what `decode/traversal.py` does."""
    parents = parents_BN.tolist()
    places_BN = tokens_BN.clone()
    if drawn.token_map is not None:
        place_V = torch.full(logits_BNV.shape[2:], -1)  # of tokens that heads cannot propose
        place_V[drawn.token_map] = torch.arange(len(drawn.token_map))
        places_BN = place_V[tokens_BN]
    places, uniforms = places_BN.tolist(), uniforms_BN.tolist()
    paths, rests, p_of_ends, place_of_ends = [], [], [], []
    for row in range(len(places)):
        end = _Row(logits_BNV[row], drawn, row, places[row], uniforms[row], filters).visit(0, 1.0)
        assert end is not None  # the root is always kept
        node, p_V, rest_V = end
        path = [node]
        while node:
            node = parents[row][node]
            path.append(node)
        paths.append(path[::-1])
        rests.append(rest_V)
        p_of_ends.append(p_V)
        place_of_ends.append(uniforms[row][0] * float(rest_V.sum()))
    place_B1 = torch.tensor(place_of_ends, dtype=torch.float64)[:, None]
    found = token_at(torch.stack(rests), place_B1, torch.stack(p_of_ends))
    return _verdict(paths, found.tolist(), length)


@dataclass
class _Row:
    """A tree whose nodes are visited; the names are those of `decode.sampled.Rejection`."""

    logits_NV: Tensor
    drawn: Drawn
    row: int
    places: list[int]
    """Of each node's token in the head vocabulary, or -1."""
    uniforms: list[float]
    filters: Filters

    def visit(self, node: int, weight: float) -> tuple[int, Tensor, Tensor] | None:
        """Return the path's last node where this subtree has it, p_V there, and what is left."""
        children = self.drawn.children[node]
        if node and not children and self.uniforms[node] >= weight:
            return None
        p_V, token_map = probabilities(self.logits_NV[node], *self.filters), self.drawn.token_map
        if children:
            p_W = (p_V if token_map is None else p_V.index_select(0, token_map)).numpy()
            q_W = self.drawn.q_BQW[self.row, self.drawn.q_index[node]].to(p_V.dtype).numpy()
            q_left_W, rest_W, factor = q_W.copy(), p_W, 0.0
            largest = float(np.finfo(q_W.dtype).max)
            q_sum, p_sum = float(q_W.sum()), float(p_V.sum())
            others = max(p_sum - float(p_W.sum()), 0.0) if token_map is not None else 0.0
            for child in children:
                place = self.places[child]
                q_left = float(q_left_W[place]) if place >= 0 else 0.0
                if not (q_left > 0 and p_sum > 0 and weight > 0):
                    continue
                of_child = weight * float(rest_W[place]) / p_sum * (q_sum / q_left)
                end = self.visit(child, min(1.0, of_child))
                if end is not None:
                    return end
                factor = min(factor + p_sum / weight / q_sum, largest)
                rest_W = np.maximum(p_W - factor * q_W, 0)
                before, p_sum = p_sum, float(rest_W.sum()) + others
                if weight < 1:
                    left = weight * p_sum / before
                    weight = left / (left + 1 - weight)
                q_left_W[place] = 0
                q_sum = float(q_left_W.sum())
        if node and self.uniforms[node] >= weight:
            return None
        if not children:
            return node, p_V, p_V
        own_W = torch.from_numpy(rest_W)
        return node, p_V, own_W if token_map is None else p_V.index_copy(0, token_map, own_W)


def _verdict(paths: list[list[int]], last_tokens: list[int], length: int) -> Verdict:
    return Verdict(
        torch.tensor([path + [-1] * (length - len(path)) for path in paths]),
        torch.tensor([len(path) - 1 for path in paths]),
        torch.tensor(last_tokens),
    )
