"""Verification of drafts that were drawn: a tree's paths are judged whole, children before parents.

Node by node from the root down (recursive rejection), a child that fails is lost with all its
descendants, however well these would have made up for it. Traversal verification (Weng et al.,
arXiv 2505.12398; of a chain it is block verification, Sun et al., arXiv 2403.10444) visits the tree
depth first. A visited node has a weight a, the probability that a step keeps the path down to it,
or a longer one. The root has 1, and a child with token x

    a(child) = min(1, a p(x) / q(x))

where p is the backbone's distribution after its parent, and q the head's that it was drawn from. A
node without children, or whose children have all failed, is kept with probability a, and the path
ends there. If it is not, it has failed, and its parent's p, a and q become, of what they were,

    p <- norm(max(a p - q, 0)), a <- S / (S + 1 - a) with S = sum max(a p - q, 0), q loses x

before the next child is visited. The root is always kept, and the token after the path is drawn
from the p that is left at its end.

What a step commits, continued by the backbone, is distributed as the backbone's tokens. The tokens
of a step are not, one by one: where some were kept, the next is not distributed by p, as it would
be under recursive rejection.

Which nodes are visited depends on what the descendants of their elder siblings are: so each node
draws its children by numbers of its own.

B rows, N tree nodes, V vocabulary, Q distributions of W tokens that heads can propose, X = V, or W
and all others as one, M places of which one is picked.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa_exp.decode.distribution import Filters, probabilities, token_at
from medusa_exp.decode.sampled import Drawn, Rejection, with_others


def traverse(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    drawn: Drawn,
    uniforms_BN: Tensor,
    filters: Filters,
) -> tuple[Tensor, Tensor]:
    """Return the last node of each row's path [B, 1], and the token after it [B].

    All rows visit all nodes, at once: their tokens differ, not the shape of their trees. Nothing
    waits for the device. (`decode/cpu_verify.py` goes row by row, as far as need be.)

    Args:
        logits_BNV: the backbone's after each node.
        tokens_BN: each node's token.
        drawn: what they were drawn from.
        uniforms_BN: a number in [0, 1) for each node, which decides whether it is kept; the root's
            draws the token after the path.
        filters: of p; those of q are in `drawn`.
    """
    return _Traversal(logits_BNV, tokens_BN, drawn, uniforms_BN, filters).run()


class _Traversal:
    def __init__(
        self,
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        drawn: Drawn,
        uniforms_BN: Tensor,
        filters: Filters,
    ) -> None:
        self._logits_BNV, self._tokens_BN, self._drawn = logits_BNV, tokens_BN, drawn
        self._uniforms_BN, self._filters = uniforms_BN, filters
        self._place_V: Tensor | None = None
        if drawn.token_map is not None:
            number = len(drawn.token_map)
            self._place_V = tokens_BN.new_full((logits_BNV.shape[2],), number)
            self._place_V[drawn.token_map] = torch.arange(number, device=tokens_BN.device)
        dtype = torch.promote_types(logits_BNV.dtype, torch.float32)
        self._end_B1 = torch.zeros_like(tokens_BN[:, :1])
        self._is_open_B1 = torch.ones_like(self._end_B1, dtype=torch.bool)
        self._one_B1 = torch.ones_like(self._end_B1, dtype=dtype)
        # Of the end: `Rejection.factor`, and which of the distributions it is a factor of.
        self._factor_B1, self._q_index_B1 = torch.zeros_like(self._one_B1), self._end_B1

    def run(self) -> tuple[Tensor, Tensor]:
        self._visit(0, self._one_B1)
        p_BV = probabilities(_at(self._logits_BNV, self._end_B1), *self._filters)
        q_BW = _at(self._drawn.q_BQW, self._q_index_B1).to(p_BV.dtype)
        token_map = self._drawn.token_map
        p_BW = p_BV if token_map is None else p_BV.index_select(1, token_map)
        rest_BV = (p_BW - self._factor_B1 * q_BW).clamp(min=0)
        if token_map is not None:
            rest_BV = p_BV.index_copy(1, token_map, rest_BV)
        place_B1 = self._uniforms_BN[:, :1].to(p_BV.dtype) * rest_BV.sum(-1, keepdim=True)
        return self._end_B1, token_at(rest_BV, place_B1, p_BV)

    def _visit(self, node: int, weight_B1: Tensor) -> None:
        factor_B1 = torch.zeros_like(self._one_B1)
        if children := self._drawn.children[node]:
            left = self._rejection(node, weight_B1)
            for child in children:
                token_B1 = self._tokens_BN[:, child : child + 1]
                if self._place_V is not None:
                    token_B1 = self._place_V[token_B1]
                self._visit(child, left.child_weight(token_B1))
                left.fail(token_B1)
            weight_B1, factor_B1 = left.weight, left.factor
        is_kept_B1 = self._is_open_B1
        if node:
            is_kept_B1 = is_kept_B1 & (self._uniforms_BN[:, node : node + 1] < weight_B1)
        self._end_B1 = torch.where(is_kept_B1, node, self._end_B1)
        self._factor_B1 = torch.where(is_kept_B1, factor_B1, self._factor_B1)
        q_index = self._drawn.q_index[node]
        self._q_index_B1 = torch.where(is_kept_B1, q_index, self._q_index_B1)
        self._is_open_B1 = self._is_open_B1 & ~is_kept_B1

    def _rejection(self, node: int, weight_B1: Tensor) -> Rejection:
        p_BX = probabilities(self._logits_BNV[:, node], *self._filters)
        q_BX = self._drawn.q_BQW[:, self._drawn.q_index[node]].to(p_BX.dtype)
        if self._drawn.token_map is not None:
            p_BX, q_BX = with_others(p_BX, self._drawn.token_map), pad(q_BX, (0, 1))
        return Rejection(p_BX, q_BX, weight_B1)


def _at(values_BMX: Tensor, index_B1: Tensor) -> Tensor:
    return values_BMX.gather(1, index_B1[..., None].expand(-1, 1, values_BMX.shape[2]))[:, 0]
