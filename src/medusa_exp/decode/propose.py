"""Hidden state in, the tree's tokens out.

D hidden, V vocabulary, K heads, N tree nodes, R ranks.
"""

import numpy as np
import torch
from torch import Tensor, nn

from medusa_exp.model.heads import MedusaHeads
from medusa_exp.tree import Tree


class Proposer:
    """Fills a tree with the heads' guesses."""

    def __init__(self, heads: nn.Module, tree: Tree, device: torch.device) -> None:
        self.heads = heads
        self.num_ranks = max(tree.ranks) + 1
        self.depth = tree.depth
        # Where each node's token stands in [root token, head 1's guesses, head 2's, ...].
        place_N = np.maximum(0, 1 + (tree.depths - 1) * self.num_ranks + np.array(tree.ranks))
        place_N[0] = 0
        self.place_N = torch.from_numpy(place_N).to(device)

    def __call__(self, root_token: Tensor, hidden_1D: Tensor) -> Tensor:
        """Return tokens_1N: the root's certain token, and a guess at every other node.

        Args:
            root_token: [1], the token that follows the hidden state for sure.
            hidden_1D: the backbone's last hidden state one position before the root.
        """
        if not self.depth:
            return root_token[None]
        if isinstance(self.heads, MedusaHeads):  # deeper heads need not be read from memory
            logits_KV = self.heads(hidden_1D, self.depth)[0]
        else:
            logits_KV = self.heads(hidden_1D)[0, : self.depth]
        guesses_KR = logits_KV.topk(self.num_ranks, dim=-1).indices
        return torch.cat([root_token, guesses_KR.flatten()])[self.place_N][None]
