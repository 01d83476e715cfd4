"""Trees of guesses by heads that see what was drafted before them: one depth after the other.

B rows, D hidden, N tree nodes, M nodes of one depth that have children, J tokens from the root to a
node, Q = B x M states that a head reads, W tokens that the heads know, R ranks.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_exp.decode.draft import Draft, check_fit
from medusa_exp.decode.verify import Nodes
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.tree import Tree


@dataclass(frozen=True)
class _Depth:
    """How the nodes of one depth are drafted."""

    path_MJ: Tensor
    """Nodes from the root to each parent."""
    children_C: Tensor
    parent_C: Tensor
    """Place of each child's parent among the M."""
    rank_C: Tensor
    num_ranks: int


class SequentialTree:
    """Fills the same tree at every step, each guess with those before it in view.

    See `draft.Proposer`.
    """

    def __init__(self, heads: MedusaHeads, tree: Tree, device: torch.device) -> None:
        """Plan the tree's depths.

        Raises:
            UserError: it asks for guesses that the heads lack.
        """
        check_fit(tree.depth, max(tree.ranks) + 1, heads.num_heads, heads.config.vocab_size)
        self.num_nodes, self.depth = len(tree), tree.depth
        self._heads, self.prefix = heads, heads.prefix
        self.key: Hashable = (id(heads), tree)
        self._depths = [_plan(tree, depth, device) for depth in range(1, tree.depth + 1)]
        self._parents_1N = torch.tensor([tree.parents], device=device)
        ancestors_1NN = torch.from_numpy(tree.mask).to(device)[None]
        self._nodes = Nodes(self._parents_1N, self.depth, ancestors_1NN)
        self._depths_1N = torch.from_numpy(tree.depths).to(device)[None]

    def __call__(self, root_B: Tensor, hidden_BD: Tensor) -> Draft:
        """Return trees below the roots; see `draft.Proposer`."""
        tokens_BN = root_B[:, None].repeat(1, self.num_nodes)
        hidden_BD = hidden_BD.to(self._heads.dtype)
        for k, plan in enumerate(self._depths):
            drafted_BMJ = tokens_BN[:, plan.path_MJ]
            num_parents = drafted_BMJ.shape[1]
            hidden_QD = hidden_BD.repeat_interleave(num_parents, 0)
            logits_QW = self._heads.head_logits(k, hidden_QD, drafted_BMJ.flatten(0, 1))
            top_QR = logits_QW.topk(plan.num_ranks).indices
            top_BMR = top_QR.view(len(root_B), num_parents, -1)
            tokens_BN[:, plan.children_C] = top_BMR[:, plan.parent_C, plan.rank_C]
        return Draft(
            tokens_BN,
            self._parents_1N.expand(len(root_B), -1),
            self._nodes,
            self._depths_1N,
        )


def _plan(tree: Tree, depth: int, device: torch.device) -> _Depth:
    children = [node for node in range(len(tree)) if tree.depths[node] == depth]
    parents = sorted({tree.parents[node] for node in children})
    ranks = [tree.ranks[node] for node in children]
    return _Depth(
        torch.tensor(
            [tree.mask[parent].nonzero()[0].tolist() for parent in parents], device=device
        ),
        torch.tensor(children, device=device),
        torch.tensor([parents.index(tree.parents[node]) for node in children], device=device),
        torch.tensor(ranks, device=device),
        max(ranks) + 1,
    )
