"""Sampled drafts: how children are drawn, and what is left of two distributions as they fail.

The children of a node are drawn without replacement from the head's distribution q, in an order.
The first is accepted with probability min(1, p(x) / q(x)), where p is the backbone's. If it is not,
p becomes norm(max(p - q, 0)) and q loses x; then the next child is tried in the same way, and after
the last one a token is drawn from the p that is left. What comes out is distributed by p. (For one
child Leviathan et al., arXiv 2211.17192; recursively, without replacement, Jeon et al., arXiv
2402.14160, and Sequoia, arXiv 2402.12374.)

All nodes of one depth share the numbers that their children are drawn by. One of them at most is on
the accepted path, and which one it is was decided by other numbers: that is as good as numbers of
its own for each.

B rows, N tree nodes, C most children of a node, Q distributions, W tokens that heads can propose, V
vocabulary, R draws; `...` stands for any leading dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.tree import Tree


@dataclass(frozen=True)
class Drawn:
    """Where the children of a draft were drawn from."""

    q_BQW: Tensor
    """The distributions, after temperature, top-k and top-p."""
    row_N: Tensor
    """Which of the Q each node's children come from; anything, for a node without children."""
    children_NC: Tensor
    """Each node's children in the order of the draw, then -1."""
    widths: tuple[int, ...]
    """Most children of a node, by depth from the root on."""
    token_map: Tensor | None = None
    """Token ids [W] where heads cannot propose all V tokens: q is zero elsewhere."""

    def at(self, node_B1: Tensor, vocab_size: int) -> Tensor:
        """Return q_BV of the children of one node in each row."""
        row_B11 = self.row_N[node_B1][..., None].expand(-1, 1, self.q_BQW.shape[2])
        q_BW = self.q_BQW.gather(1, row_B11)[:, 0]
        if self.token_map is None:
            return q_BW
        return q_BW.new_zeros(len(q_BW), vocab_size).index_copy_(1, self.token_map, q_BW)


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


def children_of(tree: Tree) -> tuple[Tensor, tuple[int, ...]]:
    """Return `Drawn.children_NC` and `Drawn.widths` of a tree."""
    children: list[list[int]] = [[] for _ in tree.parents]
    for node, parent in enumerate(tree.parents[1:], 1):
        children[parent].append(node)
    widest = max(map(len, children))
    widths = [
        max(len(some) for some, at in zip(children, tree.depths, strict=True) if at == depth)
        for depth in range(tree.depth)
    ]
    padded = [some + [-1] * (widest - len(some)) for some in children]
    return torch.tensor(padded, dtype=torch.long).view(len(tree), widest), tuple(widths)


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


class Rejection:
    """What is left of p and q [..., V] as children are tried in the order of their draw.

    Two identities make it cheap. Rejected again and again, p becomes norm(max(p - c q, 0)) with one
    number c for all tokens, which grows with every rejection; and a token that was rejected has
    none of it left, so that the q of the beginning will do.
    """

    def __init__(self, p: Tensor, q: Tensor | None) -> None:
        """Begin with the backbone's distribution and the head's: None where there is no child."""
        self._p, self._q = p, p if q is None else q
        self._factor = torch.zeros_like(p[..., :1])
        self._p_sum = p.sum(-1, keepdim=True)
        self._q_left = None if q is None else q.clone()
        self.open = torch.ones_like(self._factor)
        """Probability that none of the children so far is accepted [..., 1]."""

    def attempt(self, token: Tensor, is_child: Tensor) -> Tensor:
        """Try the next child; return the probability that it is accepted, and no elder one.

        One that q does not have, or no longer, is passed over: rounding, or a distribution of few
        tokens, may leave nothing to draw.

        Args:
            token: [..., 1].
            is_child: [..., 1], False where there is none.
        """
        assert self._q_left is not None
        q_left = self._q_left.gather(-1, token)
        is_tried = is_child & (q_left > 0)
        q_sum = self._q_left.sum(-1, keepdim=True)
        p_of_token = (self._p.gather(-1, token) - self._factor * q_left).clamp(min=0)
        share = (p_of_token * q_sum / (self._p_sum * q_left)).nan_to_num(nan=0.0).clamp(max=1)
        share = torch.where(is_tried, share, 0.0)
        accepted = self.open * share
        self.open = self.open * (1 - share)
        added = (self._p_sum / q_sum).nan_to_num(nan=0.0, posinf=0.0)
        self._factor = self._factor + torch.where(is_tried, added, 0.0)
        self._p_sum = self.rest().sum(-1, keepdim=True)
        self._q_left.scatter_(-1, token, torch.where(is_tried, 0.0, q_left))
        return accepted

    def share_of(self, token: Tensor) -> Tensor:
        """Return the probability that the next child is this token and accepted, of those of it
        that the next draw of what is left of p would be [..., 1]; see `decode.replay`."""
        assert self._q_left is not None
        q_of_token = self._q_left.gather(-1, token) / self._q_left.sum(-1, keepdim=True)
        p_of_token = self.rest().gather(-1, token) / self._p_sum
        return (q_of_token / p_of_token).nan_to_num(nan=0.0, posinf=1.0).clamp(max=1)

    def rejected(self) -> Tensor:
        """Return how likely each token is to be the next child, and rejected [..., V]."""
        assert self._q_left is not None
        q = (self._q_left / self._q_left.sum(-1, keepdim=True)).nan_to_num(nan=0.0)
        return (q - (self.rest() / self._p_sum).nan_to_num(nan=0.0)).clamp(min=0)

    def rest(self) -> Tensor:
        """Return what is left of p, not normalized."""
        return (self._p - self._factor * self._q).clamp(min=0)
