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
    """Walk down from the root as long as a child holds the token that the backbone says.

    Args:
        logits_BNV: the backbone's logits after each node.
        tokens_BN: each node's token; the root's is never compared.
        parents_BN: each node's parent, standing before it; -1 for the root.
        rule: greedy. Its outcome equals step-by-step greedy decoding on the same logits: the
            token after a node is its argmax, the lowest id where several tie; of siblings that
            hold the same token, the first counts.
        max_depth: levels to walk; N - 1 unless the caller knows better.

    Raises:
        ValueError: the rule is not known.
    """
    if rule != "greedy":
        raise ValueError(f"rule={rule} is not known: use greedy.")
    target_BN = logits_BNV.argmax(-1)
    parent_BN = parents_BN.clamp(min=0)
    is_right_BN = (tokens_BN == target_BN.gather(1, parent_BN)) & (parents_BN >= 0)
    node_B1 = torch.zeros_like(tokens_BN[:, :1])
    path = [node_B1]
    for _ in range(tokens_BN.shape[1] - 1 if max_depth is None else max_depth):
        is_next_BN = is_right_BN & (parents_BN == node_B1)
        # max of equal values gives the first on the CPU but any on a GPU: rank them to be sure.
        found_B1, child_B1 = _first_true(is_next_BN)
        path.append(torch.where(found_B1, child_B1, -1))
        node_B1 = torch.where(found_B1, child_B1, node_B1)
        # Once nothing is found, node stays, and so nothing is found again.
    path_BL = torch.cat(path, dim=1)
    num_accepted_B = (path_BL >= 0).sum(1) - 1
    return Verdict(path_BL, num_accepted_B, target_BN.gather(1, node_B1)[:, 0])


def _first_true(mask_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (is there one_B1, index of the first_B1)."""
    countdown_N = torch.arange(mask_BN.shape[1], 0, -1, device=mask_BN.device)
    best_B1, index_B1 = (mask_BN * countdown_N).max(dim=1, keepdim=True)
    return best_B1 > 0, index_B1
