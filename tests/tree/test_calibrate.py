from itertools import combinations

import numpy as np
import pytest
import torch

from medusa_exp.model import build_heads
from medusa_exp.tree.calibrate import grow, head_ranks, prefix_counts


def test_prefix_counts_are_joint():
    ranks_PK = np.array([[0, 0], [0, 1], [1, 0], [5, 0]])
    assert prefix_counts(ranks_PK, max_rank=2) == {
        (0,): 0.5,
        (0, 0): 0.25,
        (0, 1): 0.25,
        (1,): 0.25,
        (1, 0): 0.25,
    }


@pytest.mark.parametrize("seed", range(20))
def test_grown_trees_are_the_best_of_every_size(seed):
    """Against exhaustive search over all prefix-closed sets of nodes."""
    rng = np.random.default_rng(seed)
    value = prefix_counts(rng.integers(0, 3, size=(12, 3)), max_rank=2)
    grown = grow(value, max_nodes=100)
    assert len(grown) == len(value)
    for size in range(1, min(6, len(value))):
        best = max(
            sum(value[path] for path in chosen)
            for chosen in combinations(value, size)
            if all(path[:-1] in {(), *chosen} for path in chosen)
        )
        assert sum(share for _, share in grown[:size]) == pytest.approx(best)


@torch.no_grad()
def test_head_ranks_by_hand(backbone):
    """Heads start as the lm_head, so head k ranks by the backbone's logits at the same place."""
    heads = build_heads(backbone, num_heads=2)
    prompt, answer = [1, 2, 3], [10, 11, 12, 13]
    ids = torch.tensor([prompt + answer])
    logits_TV = backbone.model(ids).logits[0]
    whole = head_ranks(backbone, heads, prompt, answer, frozenset({13}))
    cut_off = head_ranks(backbone, heads, prompt, answer, frozenset())
    assert whole.shape == (4, 2)
    for position, truth in enumerate([[11, 12], [12, 13], [13, None], [None, None]]):
        row = logits_TV[len(prompt) - 1 + position]
        expected = [64 if t is None else int((row > row[t]).sum()) for t in truth]
        assert whole[position].tolist() == expected
    assert cut_off.tolist() == whole[:2].tolist()
