"""Verification by a walk on the CPU against the specification, where vocabularies have blocks."""

import pytest
import torch

from medusa_exp.decode import verify
from medusa_exp.decode.cpu_verify import verify_on_cpu
from medusa_exp.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
ROWS, VOCAB = 40, 1000  # of four blocks the last is not full
FILTERS = [{}, {"temperature": 0.5}, {"top_k": 20}, {"top_p": 0.9, "temperature": 1.7}]


def case(seed=0):
    """Return logits, tokens that are likely after their parents, and parents."""
    generator = torch.Generator().manual_seed(seed)
    logits_BNV = 3 * torch.randn(ROWS, len(TREE), VOCAB, generator=generator, dtype=torch.float64)
    parents_BN = torch.tensor([TREE.parents]).expand(ROWS, -1)
    tokens_BN = torch.zeros(ROWS, len(TREE), dtype=torch.long)
    for node in range(1, len(TREE)):
        likeliest_BR = logits_BNV[:, TREE.parents[node]].topk(3).indices
        tokens_BN[:, node] = likeliest_BR[:, TREE.ranks[node]]
    return logits_BNV, tokens_BN, parents_BN


def both(inputs, **options):
    uniforms_BN = torch.rand(ROWS, len(TREE), generator=torch.Generator().manual_seed(9))
    options |= {"rule": "sampling", "uniforms_BN": uniforms_BN.double(), "max_depth": TREE.depth}
    return [verifier(*inputs, **options) for verifier in (verify, verify_on_cpu)]


def assert_equal(expected, found):
    assert torch.equal(found.path_BL, expected.path_BL)
    assert torch.equal(found.num_accepted_B, expected.num_accepted_B)
    assert torch.equal(found.next_token_B, expected.next_token_B)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_walk_ends_where_the_specification_ends(filters):
    expected, found = both(case(), **filters)
    assert_equal(expected, found)
    assert {0, 1} <= set(expected.num_accepted_B.tolist())
    assert (expected.next_token_B >= 768).any()


def test_copies_among_siblings_and_padding():
    logits_BNV, tokens_BN, parents_BN = case(seed=1)
    tokens_BN[:, 3] = tokens_BN[:, 1]
    parents_BN = parents_BN.clone()
    parents_BN[::2, -1] = -1
    expected, found = both((logits_BNV, tokens_BN, parents_BN))
    assert_equal(expected, found)
    assert (expected.num_accepted_B == 1).any() and not (expected.path_BL == 3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precise_logits(dtype):
    """Sums of blocks round otherwise than one long sum: another token is a neighbour in it."""
    logits_BNV, *rest = case()
    expected, found = both((logits_BNV.to(dtype), *rest))
    assert torch.equal(found.path_BL, expected.path_BL)
    assert (found.next_token_B == expected.next_token_B).float().mean() > 0.9
