"""Verification on a CPU: greedy by a walk over Python lists, the specification's twin.

Where tensors lie in the host's memory anyway, one pass over a tree of a few dozen nodes takes a
fraction of what two dozen small tensor operations take to be called.
"""

from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.verify import Verdict, verify, without_nan


def verify_on_host(
    logits_BNV: Tensor,
    tokens_BN: Tensor,
    parents_BN: Tensor,
    *,
    rule: str = "greedy",
    max_depth: int | None = None,
    **options: Any,
) -> Verdict:
    """Find the path of guesses that come true; see `verification.verify`, which does the rest."""
    if rule == "greedy":
        return verify_greedy(logits_BNV, tokens_BN, parents_BN, max_depth)
    return verify(logits_BNV, tokens_BN, parents_BN, rule=rule, max_depth=max_depth, **options)


def verify_greedy(
    logits_BNV: Tensor, tokens_BN: Tensor, parents_BN: Tensor, max_depth: int | None = None
) -> Verdict:
    """Return what `verification.verify` returns with the rule greedy; tensors are on the CPU."""
    num_nodes = tokens_BN.shape[1]
    width = 1 + (num_nodes - 1 if max_depth is None else max_depth)
    targets = without_nan(logits_BNV).argmax(-1).tolist()
    paths, last_tokens = [], []
    for target, tokens, parents in zip(
        targets, tokens_BN.tolist(), parents_BN.tolist(), strict=True
    ):
        path, at = [0], 0
        # Parents stand before children, and of equal siblings the first counts: one pass will do.
        for node in range(1, num_nodes):
            if parents[node] == at and tokens[node] == target[at]:
                path.append(node)
                at = node
        paths.append(path)
        last_tokens.append(target[at])
    return Verdict(
        torch.tensor([path + [-1] * (width - len(path)) for path in paths]),
        torch.tensor([len(path) - 1 for path in paths]),
        torch.tensor(last_tokens),
    )
