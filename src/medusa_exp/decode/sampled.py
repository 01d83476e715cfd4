"""Sampled drafts: how children are drawn, and what is left of two distributions as they fail.

The children of a node are drawn without replacement from the head's distribution q, in an order.
Recursive rejection accepts the first with probability min(1, p(x) / q(x)), where p is the
backbone's. If it is not accepted, p becomes norm(max(p - q, 0)) and q loses x; then the next child
is tried in the same way, and after the last one a token is drawn from the p that is left. What
comes out is distributed by p. (For one child Leviathan et al., arXiv 2211.17192; recursively,
without replacement, Jeon et al., arXiv 2402.14160, and Sequoia, arXiv 2402.12374.) By it trees are
replayed and chosen (`decode/replay.py`); decoding looks at whole paths and accepts more
(`decode/traversal.py`).

B rows, Q distributions, W tokens that heads can propose, V vocabulary, R draws; `...` stands for
any leading dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.tree import Tree

LEAST_DRAWN = 1e-30
"""Decoding draws no token of a smaller probability: beside it float32 has no room for the quotients
and products of verification, and a GPU takes the smallest of its numbers for zero."""


@dataclass(frozen=True)
class Drawn:
    """Where the children of a draft were drawn from; all rows have the same tree."""

    q_BQW: Tensor
    """The distributions, after temperature, top-k and top-p."""
    q_index: tuple[int, ...]
    """Which of the Q each node's children come from; 0 for a node without children."""
    children: tuple[tuple[int, ...], ...]
    """Each node's children, in the order of the draw."""
    token_map: Tensor | None = None
    """Token ids [W] where heads cannot propose all V tokens: q is zero elsewhere."""


def in_draw_order(tree: Tree) -> Tree:
    """Return the tree with the ranks 0, 1, 2 and so on for the children of each node.

    A rank is now the place in the draw. Without a gap: what is drawn in between and not tried would
    be missing from q.
    """
    seen: dict[int, int] = {}
    ranks = [-1]
    for parent in tree.parents[1:]:
        ranks.append(seen.setdefault(parent, 0))
        seen[parent] += 1
    return Tree(tree.parents, tuple(ranks))


def children_of(tree: Tree) -> tuple[tuple[int, ...], ...]:
    """Return `Drawn.children` of a tree."""
    children: list[list[int]] = [[] for _ in tree.parents]
    for node, parent in enumerate(tree.parents[1:], 1):
        children[parent].append(node)
    return tuple(map(tuple, children))


def draw(q: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens without replacement, in the order of the draws: [..., R] from q [..., W].

    One cumulative sum a draw, over what is left: of a head that is nearly sure, the sum of the
    others, taken once for all draws, would be lost in rounding. (Gumbel top-k has the same law and
    needs a random number for each of W tokens; these need R, which a request can bring along.)

    Where fewer than R tokens have a probability, the draws behind them are tokens without one, or
    repeated: none of these is ever accepted.

    Args:
        q: probabilities.
        uniforms: numbers in [0, 1) [..., R].
    """
    left, drawn = q.clone(), []
    for uniform in uniforms.to(q.dtype).unbind(-1):
        sums = left.cumsum(-1)
        place = (uniform[..., None] * sums[..., -1:]).contiguous()
        token = torch.searchsorted(sums, place, right=True).clamp(max=q.shape[-1] - 1)
        left.scatter_(-1, token, 0.0)
        drawn.append(token)
    return torch.cat(drawn, -1)


def with_others(p: Tensor, token_map: Tensor) -> Tensor:
    """Return [..., W + 1] of p [..., V]: tokens that heads can propose, and all others as one."""
    own = p.index_select(-1, token_map)
    others = (p.sum(-1, keepdim=True) - own.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([own, others], -1)


class Rejection:
    """What is left of p and q [..., V] as children fail in the order of their draw.

    Node by node (recursive rejection) the weight a is 1 throughout; see `decode/traversal.py` for
    others. Two identities make it cheap. Rejected again and again, p becomes norm(max(p - c q, 0))
    with one number c for all tokens, which grows with every rejection; and a token that failed has
    none of it left, as its own weight was below 1, so that the q of the beginning will do.
    """

    def __init__(self, p: Tensor, q: Tensor, weight: Tensor | None = None) -> None:
        """Begin with the backbone's distribution and the head's, and a [..., 1]."""
        self._p, self._q, self._q_left = p, q, q.clone()
        self._p_sum, self._q_sum = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        self.factor = torch.zeros_like(self._p_sum)
        """The number c [..., 1]."""
        self.weight = torch.ones_like(self._p_sum) if weight is None else weight
        """The number a [..., 1]."""

    def child_weight(self, token: Tensor) -> Tensor:
        """Return min(1, a p(x) / q(x)) of the next child, whose token [..., 1] is x.

        It is 0 for one that q does not have, or no longer: rounding, or a distribution of few
        tokens, may leave nothing to draw.
        """
        q_left = self._q_left.gather(-1, token)
        p_of_token = (self._p.gather(-1, token) - self.factor * q_left).clamp(min=0)
        weight = self.weight * p_of_token / self._p_sum * (self._q_sum / q_left)
        return torch.where(q_left > 0, weight.clamp(max=1).nan_to_num(nan=0.0), 0.0)

    def fail(self, token: Tensor) -> None:
        """Take note that the child with this token failed.

        Nothing is left to change where q does not have it, or a is 0.
        """
        is_tried = (self._q_left.gather(-1, token) > 0) & (self.weight > 0)
        before = self._p_sum
        added = (before / self.weight / self._q_sum).nan_to_num(nan=0.0)
        largest = torch.finfo(added.dtype).max  # times a q of 0 it is 0, as infinity is not
        self.factor = (self.factor + torch.where(is_tried, added, 0.0)).clamp(max=largest)
        self._p_sum = self.rest().sum(-1, keepdim=True)
        left = (self.weight * self._p_sum / before).nan_to_num(nan=0.0)
        weight = (left / (left + 1 - self.weight)).nan_to_num(nan=0.0)
        # Of a weight of 1 nothing is lost: 0 / 0 would be where p and q are equal.
        self.weight = torch.where(is_tried & (self.weight < 1), weight, self.weight)
        self._q_left.scatter_(-1, token, 0.0)
        self._q_sum = self._q_left.sum(-1, keepdim=True)

    def share_of(self, token: Tensor) -> Tensor:
        """Return the probability that the next child is this token and accepted, of those of it
        that the next draw of what is left of p would be [..., 1]; see `decode.replay`."""
        q_of_token = self._q_left.gather(-1, token) / self._q_sum
        p_of_token = self.rest().gather(-1, token) / self._p_sum
        return (q_of_token / p_of_token).nan_to_num(nan=0.0, posinf=1.0).clamp(max=1)

    def rejected(self) -> Tensor:
        """Return how likely each token is to be the next child, and rejected [..., V]."""
        q = (self._q_left / self._q_sum).nan_to_num(nan=0.0)
        return (q - (self.rest() / self._p_sum).nan_to_num(nan=0.0)).clamp(min=0)

    def rest(self) -> Tensor:
        """Return what is left of p, not normalized."""
        return (self._p - self.factor * self._q).clamp(min=0)
