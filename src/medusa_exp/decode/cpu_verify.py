"""Verification on a CPU: a walk down from the root, which looks at the nodes it comes to alone.

The specification, `decode/verify.py`, asks the same of every node, in few and large operations, and
waits for nothing: as a GPU wants it. In the host's memory it is cheaper to see where a path ends.
Greedily that is one pass over Python lists. Where the next token is drawn, probabilities are
computed of the two or three nodes that are come to: of nine nodes of 262,144 logits in 0.5 ms, for
which the specification takes 9.5 (two cores). Numbers decide what they decide there. (Drafts that
were drawn have one code for all devices, `decode/traversal.py`, which stops early on a CPU.)

B rows of a batch, O rows whose walk goes on, N tree nodes, C most children of the nodes where these
stand, V vocabulary, L path length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.distribution import probabilities, token_at
from medusa_exp.decode.sampled import Drawn
from medusa_exp.decode.verify import Verdict, check_rule, verify
from medusa_exp.model.argmax import argmax

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
    if rule == "sampling" and drawn is None:
        assert uniforms_BN is not None
        choose = _Draws(logits_BNV, tokens_BN, uniforms_BN, (temperature, top_k, top_p))
        return _walk(tokens_BN, parents_BN, width, choose)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "drawn": drawn}
    options |= {"uniforms_BN": uniforms_BN}
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
    """Chooses by one number a node, as the rule sampling says of drafts that were not drawn."""

    def __init__(
        self,
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        uniforms_BN: Tensor,
        filters: tuple[float, int | None, float | None],
    ) -> None:
        self._logits_BNV, self._tokens_BN = logits_BNV, tokens_BN
        self._uniforms_BN, self._filters = uniforms_BN, filters

    def __call__(self, rows: list[int], at: list[int], children: list[list[int]]) -> Chosen:
        """Choose; see `_walk`."""
        all_at_root = len(rows) == len(self._logits_BNV) and not any(at)
        logits_OV = self._logits_BNV[:, 0] if all_at_root else self._logits_BNV[rows, at]
        p_OV = probabilities(logits_OV, *self._filters)
        chosen, rest_OV, places_O = [-1] * len(rows), p_OV, self._uniforms_BN[rows, at]
        if any(children):
            chosen, rest_OV, places_O = self._of_given(p_OV, places_O, rows, children)
        ended = [o for o, child in enumerate(chosen) if child < 0]
        tokens = [-1] * len(rows)
        if ended:
            part = slice(None) if len(ended) == len(rows) else ended
            found = token_at(rest_OV[part], places_O[part, None], p_OV[part])
            for o, token in zip(ended, found.tolist(), strict=True):
                tokens[o] = token
        return list(zip(chosen, tokens, strict=True))

    def _of_given(
        self, p_OV: Tensor, uniforms_O: Tensor, rows: list[int], children: list[list[int]]
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
        uniforms = uniforms_O.tolist()
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
