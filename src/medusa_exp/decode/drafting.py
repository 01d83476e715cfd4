"""Certain tokens and hidden states in, trees of guesses out.

B rows, D hidden, V vocabulary, K heads, N tree nodes, R ranks, M nodes to choose from.
"""

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor, nn

from medusa_exp.decode.draft import Draft, Proposer, check_fit
from medusa_exp.decode.sequential import SequentialTree
from medusa_exp.decode.verify import Nodes
from medusa_exp.errors import UserError
from medusa_exp.model.heads import MedusaHeads, StackedHeads
from medusa_exp.tree import Tree, chain

_NO_CHANCE = -1e4
"""Log of a probability that is none. Sums over a path still tell 1e-9 apart in float64."""


class StaticTree:
    """Fills the same tree with the heads' guesses at every step."""

    def __init__(self, heads: nn.Module, tree: Tree, device: torch.device) -> None:
        self.num_nodes, self.depth = len(tree), tree.depth
        self._heads = heads
        self.prefix = getattr(heads, "prefix", None) if self.depth else None
        self.key: Hashable = (id(heads) if self.depth else None, tree)
        self._num_ranks = max(tree.ranks) + 1
        self._place_N = torch.from_numpy(_places(tree, self._num_ranks)).to(device)
        self._parents_1N = torch.tensor([tree.parents], device=device)
        ancestors_1NN = torch.from_numpy(tree.mask).to(device)[None]
        self._nodes = Nodes(self._parents_1N, self.depth, ancestors_1NN)
        self._depths_1N = torch.from_numpy(tree.depths).to(device)[None]

    def __call__(self, root_B: Tensor, hidden_BD: Tensor) -> Draft:
        """Return trees below the roots; see `draft.Proposer`."""
        tokens_BN = root_B[:, None]
        if self.depth:
            logits_BKV = _head_logits(self._heads, hidden_BD, self.depth, self._num_ranks)
            guesses_BKR = logits_BKV.topk(self._num_ranks, dim=-1).indices
            tokens_BN = torch.cat([tokens_BN, guesses_BKR.flatten(1)], dim=1)[:, self._place_N]
        return Draft(
            tokens_BN,
            self._parents_1N.expand(len(root_B), -1),
            self._nodes,
            self._depths_1N,
        )


class DynamicTree:
    """Picks, at every step and for every row, the likeliest nodes of a larger tree.

    A node is as likely as the product of its guesses' probabilities; parents are likelier than
    their children, so that the N likeliest nodes are a tree, and the best one of N nodes if the
    heads' probabilities are right and their errors independent. (EAGLE-2, arXiv 2406.16858, ranks
    its drafts by the same product.)
    """

    def __init__(
        self, heads: nn.Module, choices: Tree, num_nodes: int, device: torch.device
    ) -> None:
        """Pick from a tree.

        Args:
            heads: any module with `heads(hidden_BD) -> logits_BKV`.
            choices: the tree to pick from.
            num_nodes: how many nodes to pick, the root included.
            device: where to.
        """
        self.num_nodes, self.depth = min(num_nodes, len(choices)), choices.depth
        self._heads = heads
        self.prefix = getattr(heads, "prefix", None)
        self.key: Hashable = (id(heads), choices, num_nodes)
        self._num_ranks = max(choices.ranks) + 1
        self._place_M = torch.from_numpy(_places(choices, self._num_ranks)).to(device)
        self._parent_M = torch.tensor(choices.parents, device=device).clamp(min=0)
        self._ancestors_MM = torch.from_numpy(choices.mask).to(device)
        self._depth_M = torch.from_numpy(choices.depths).to(device)

    def __call__(self, root_B: Tensor, hidden_BD: Tensor) -> Draft:
        """Return trees below the roots; see `draft.Proposer`."""
        logits_BKV = _head_logits(self._heads, hidden_BD, self.depth, self._num_ranks)
        top = logits_BKV.double().log_softmax(-1).topk(self._num_ranks, dim=-1)
        tokens_BM = torch.cat([root_B[:, None], top.indices.flatten(1)], 1)[:, self._place_M]
        # Minus infinity times 0, and NaN, would make every score of the row NaN.
        values_BKR = top.values.nan_to_num(nan=_NO_CHANCE).clamp(min=_NO_CHANCE)
        # A root is certain. Equal numbers (a guess of probability 1) must leave parents first.
        zero_B1 = values_BKR.new_zeros(len(root_B), 1)
        step_BM = torch.cat([zero_B1, values_BKR.flatten(1)], 1)[:, self._place_M] - 1e-9
        score_BM = step_BM @ self._ancestors_MM.T.to(step_BM.dtype)
        node_BN = score_BM.topk(self.num_nodes, dim=1).indices.sort(dim=1).values
        place_BM = torch.zeros_like(score_BM, dtype=torch.long).scatter_(
            1, node_BN, torch.arange(self.num_nodes, device=node_BN.device).expand_as(node_BN)
        )
        parents_BN = place_BM.gather(1, self._parent_M[node_BN])
        parents_BN[:, 0] = -1
        ancestors_BNN = self._ancestors_MM[node_BN[:, :, None], node_BN[:, None, :]]
        return Draft(
            tokens_BM.gather(1, node_BN),
            parents_BN,
            Nodes(parents_BN, self.depth, ancestors_BNN),
            self._depth_M[node_BN],
        )


def build_proposer(heads: nn.Module, tree: Tree, device: torch.device) -> Proposer:
    """Return what makes drafts of a tree: the same at every step, or some picked nodes of it.

    Raises:
        UserError: nodes are to be picked, and each head waits for the guesses of the one before.
    """
    if getattr(heads, "is_sequential", False):
        if tree.num_picked is not None:
            raise UserError("tree=dynamic: heads of kind=hydra cannot guess ahead of a choice.")
        return SequentialTree(heads, tree, device)
    if tree.num_picked is None or tree.num_picked == 1:
        return StaticTree(heads, tree if tree.num_picked is None else chain(0), device)
    return DynamicTree(heads, tree, tree.num_picked, device)


def _places(tree: Tree, num_ranks: int) -> np.ndarray:
    """Return where each node's token stands in [root, head 1's guesses, head 2's, ...]."""
    place_N = 1 + (tree.depths - 1) * num_ranks + np.array(tree.ranks)
    place_N[0] = 0
    return place_N


def _head_logits(heads: nn.Module, hidden_BD: Tensor, depth: int, num_ranks: int) -> Tensor:
    """Return logits_BKV of as many heads as the tree is deep."""
    if isinstance(heads, MedusaHeads | StackedHeads):  # deeper heads need not be read
        logits_BKV = heads(hidden_BD.to(heads.dtype), min(depth, heads.num_heads))
    else:
        logits_BKV = heads(hidden_BD)
        if logits_BKV.ndim != 3:
            raise ValueError(
                f"heads(hidden_BD) must return [B, K, V], not {list(logits_BKV.shape)}."
            )
    check_fit(depth, num_ranks, *logits_BKV.shape[1:])
    return logits_BKV[:, :depth]
