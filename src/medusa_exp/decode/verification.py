"""Which guesses of a tree come true: the specification in torch.

B batch, N tree nodes, V vocabulary, L path length. No operation waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Verdict:
    """The accepted path of each row of the batch."""

    path_BL: Tensor
    """Node numbers from the root (node 0) down, then -1."""
    num_accepted_B: Tensor
    """Guesses accepted: the path's nodes without the root."""
    next_token_B: Tensor
    """The backbone's own token after the path."""


def verify(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor,
    *,
    rule: str = "greedy",
    max_depth: int | None = None,
) -> Verdict:
    """Find the path from the root whose every node holds the token that the backbone says.

    Args:
        logits_BNV: the backbone's logits after each node.
        tokens_BN: each node's token; the root's is never compared.
        parents_BN: each node's parent, standing before it; -1 for the root.
        rule: greedy. Its outcome equals step-by-step greedy decoding on the same logits: the
            token after a node is its argmax, the lowest id where several tie; of siblings that
            hold the same token, the first counts.
        max_depth: depth of the deepest tree; N - 1 unless the caller knows better.

    Raises:
        ValueError: the rule is not known.
    """
    if rule != "greedy":
        raise ValueError(f"rule={rule} is not known: use greedy.")
    num_nodes = tokens_BN.shape[1]
    depth = num_nodes - 1 if max_depth is None else max_depth
    target_BN = logits_BNV.argmax(-1)
    parent_BN = parents_BN.clamp(min=0)
    is_right_BN = (tokens_BN == target_BN.gather(1, parent_BN)) & (parents_BN >= 0)
    is_accepted_BN = is_right_BN & ~_has_right_elder_sibling(is_right_BN, parents_BN)
    is_accepted_BN[:, 0] = True
    # Ask the parent, then the grandparent's answer, then the one four above: after r rounds a node
    # knows about its 2^r - 1 nearest ancestors.
    ancestor_BN = parent_BN
    for _ in range(depth.bit_length()):
        is_accepted_BN = is_accepted_BN & is_accepted_BN.gather(1, ancestor_BN)
        ancestor_BN = ancestor_BN.gather(1, ancestor_BN)
    # What is left is one path, and parents stand before children: in order of node numbers.
    node_N = torch.arange(num_nodes, device=tokens_BN.device)
    path_BN = torch.where(is_accepted_BN, node_N, num_nodes).sort(dim=1).values
    path_BL = path_BN[:, : depth + 1]
    last_B1 = (is_accepted_BN * node_N).max(dim=1, keepdim=True).values
    return Verdict(
        path_BL.masked_fill(path_BL == num_nodes, -1),
        is_accepted_BN.sum(1) - 1,
        target_BN.gather(1, last_B1)[:, 0],
    )


def _has_right_elder_sibling(is_right_BN: Tensor, parents_BN: Tensor) -> Tensor:
    """Return, for each node, whether a sibling before it holds the right token too."""
    is_sibling_BNN = parents_BN[:, :, None] == parents_BN[:, None, :]
    return (is_sibling_BNN.tril(-1) & is_right_BN[:, None, :]).any(-1)
