"""Verification of drafts that were drawn: a tree is gone through from its leaves to its root.

Node by node from the root down (recursive rejection), a child that fails ends the path, however
well its descendants would have made up for it. Traversal verification (Weng et al., arXiv
2505.12398; of a chain it is block verification, Sun et al., arXiv 2403.10444) judges whole paths.
A node that is come to has a weight a, the probability that the path down to it is kept, or a longer
one. The root has 1, and a child with token x

    a(child) = min(1, a(node) * p(x) / q(x))

where p is the backbone's distribution after the node, and q the head's that the child was drawn
from. The first leaf is come to first. A node whose children have all failed is kept with its
weight, and the path ends there; if it is not kept either, what is left to its parent is

    p <- norm(max(a p - q, 0)), a <- S / (S + 1 - a) with S = sum max(a p - q, 0), q loses x

and the next child is tried. The root is always kept, and the token after the path is drawn from the
p that is left to its end. Tokens over several steps are distributed as the backbone's; given that
a step kept some, the next of its tokens is not, as it is node by node.

Which node is come to next hangs on what its siblings' descendants were, so that each node draws its
children by numbers of its own.

B rows, N tree nodes, V vocabulary, W tokens that heads can propose, X = V, or W and all others as
one.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa_exp.decode.distribution import probabilities, token_at
from medusa_exp.decode.sampled import Drawn, Rejection


class Traversal:
    """Goes through the trees of a batch, all rows at once: their tokens differ, not their shape.

    Nothing waits for a GPU, which goes through all nodes; a CPU stops where all rows have ended.
    """

    def __init__(
        self,
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        drawn: Drawn,
        uniforms_BN: Tensor,
        filters: tuple[float, int | None, float | None],
    ) -> None:
        """Begin at the root.

        Args:
            logits_BNV: the backbone's after each node.
            tokens_BN: each node's token.
            drawn: what they were drawn from.
            uniforms_BN: a number in [0, 1) for each node; the root's draws the token at the end.
            filters: temperature, top-k and top-p of both sides.
        """
        self._logits_BNV, self._tokens_BN, self._drawn = logits_BNV, tokens_BN, drawn
        self._uniforms_BN, self._filters = uniforms_BN, filters
        self._place_V: Tensor | None = None
        if drawn.token_map is not None:
            number = len(drawn.token_map)
            self._place_V = torch.full_like(tokens_BN[0, :1], number).repeat(logits_BNV.shape[2])
            self._place_V[drawn.token_map] = torch.arange(number, device=tokens_BN.device)
        self.end_B1 = torch.zeros_like(tokens_BN[:, :1])
        """The last node of each path."""
        self._is_open_B1 = torch.ones_like(self.end_B1, dtype=torch.bool)
        dtype = torch.promote_types(logits_BNV.dtype, torch.float32)
        self._one_B1 = torch.ones_like(self.end_B1, dtype=dtype)
        self._factor_B1, self._row_B1 = torch.zeros_like(self._one_B1), self.end_B1
        """Of the end: `Rejection.factor`, and which of the distributions it is a factor of."""

    def run(self) -> Tensor:
        """Find the paths, and return the token after each [B]."""
        self._visit(0, self._one_B1)
        p_BV = probabilities(_at(self._logits_BNV, self.end_B1), *self._filters)
        taken = self._factor_B1 * _at(self._drawn.q_BQW, self._row_B1).to(p_BV.dtype)
        if (token_map := self._drawn.token_map) is None:
            rest_BV = p_BV - taken
        else:
            rest_BV = p_BV.index_add(1, token_map, taken, alpha=-1)
        rest_BV = rest_BV.clamp(min=0)
        place_B1 = self._uniforms_BN[:, :1].to(p_BV.dtype) * rest_BV.sum(-1, keepdim=True)
        return token_at(rest_BV, place_B1, p_BV)

    def _visit(self, node: int, weight_B1: Tensor) -> None:
        """Go through the subtree of a node, which has this weight."""
        factor_B1 = torch.zeros_like(self._one_B1)
        if children := self._drawn.children[node]:
            left = self._rejection(node, weight_B1)
            for child in children:
                token_B1 = self._tokens_BN[:, child : child + 1]
                if self._place_V is not None:
                    token_B1 = self._place_V[token_B1]
                self._visit(child, left.share(token_B1))
                if self._has_ended():
                    return
                left.fail(token_B1)
            weight_B1, factor_B1 = left.weight, left.factor
        is_kept_B1 = self._is_open_B1
        if node:
            is_kept_B1 = is_kept_B1 & (self._uniforms_BN[:, node : node + 1] < weight_B1)
        self.end_B1 = torch.where(is_kept_B1, node, self.end_B1)
        self._factor_B1 = torch.where(is_kept_B1, factor_B1, self._factor_B1)
        self._row_B1 = torch.where(is_kept_B1, self._drawn.rows[node], self._row_B1)
        self._is_open_B1 = self._is_open_B1 & ~is_kept_B1

    def _rejection(self, node: int, weight_B1: Tensor) -> Rejection:
        p_BX, q_BX = self._p_at(node), self._drawn.q_BQW[:, self._drawn.rows[node]]
        if (token_map := self._drawn.token_map) is not None:
            p_BW, q_BX = p_BX.index_select(1, token_map), pad(q_BX, (0, 1))
            others_B1 = p_BX.sum(-1, keepdim=True) - p_BW.sum(-1, keepdim=True)
            p_BX = torch.cat([p_BW, others_B1.clamp(min=0)], 1)
        return Rejection(p_BX, q_BX.to(p_BX.dtype), weight_B1)

    def _p_at(self, node: int) -> Tensor:
        return probabilities(self._logits_BNV[:, node], *self._filters)

    def _has_ended(self) -> bool:
        return self._is_open_B1.device.type == "cpu" and not bool(self._is_open_B1.any())


def _at(values_BMX: Tensor, index_B1: Tensor) -> Tensor:
    """Return [B, X], of each row the values at one index."""
    return values_BMX.gather(1, index_B1[..., None].expand(-1, 1, values_BMX.shape[2]))[:, 0]
