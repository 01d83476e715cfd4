"""Verification by a walk on the CPU against the specification, where vocabularies have blocks."""

import pytest
import torch

from medusa_exp.decode import verify
from medusa_exp.decode.cpu_verify import token_at, verify_on_cpu
from medusa_exp.decode.sampled import Drawn, children_of, draw, in_draw_order
from medusa_exp.tree import Tree

TREE = in_draw_order(Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]))
ROWS, VOCAB = 40, 1000  # of four blocks the last is not full
FILTERS = [{}, {"temperature": 0.5}, {"top_k": 20}, {"top_p": 0.9, "temperature": 1.7}]


def case(num_tokens, seed=0):
    """Return logits, tokens drawn from heads that know something, parents, and their draw."""
    generator = torch.Generator().manual_seed(seed)
    size = len(TREE)
    logits_BNV = 3 * torch.randn(ROWS, size, VOCAB, generator=generator, dtype=torch.float64)
    token_map = torch.randperm(VOCAB, generator=generator)[:num_tokens]
    noise_BNW = torch.randn(ROWS, size, num_tokens, generator=generator, dtype=torch.float64)
    q_BNW = (logits_BNV[:, :, token_map] + noise_BNW).softmax(-1)
    children_NC, widths = children_of(TREE)
    tokens_BN = torch.zeros(ROWS, size, dtype=torch.long)
    for node, some in enumerate(children_NC.tolist()):
        children = [child for child in some if child >= 0]
        uniforms = torch.rand(ROWS, len(children), generator=generator)
        if children:
            tokens_BN[:, children] = token_map[draw(q_BNW[:, node], uniforms)]
    parents_BN = torch.tensor([TREE.parents]).expand(ROWS, -1)
    given = None if num_tokens == VOCAB else token_map
    drawn = Drawn(q_BNW, torch.arange(size), children_NC, widths, given)
    return (logits_BNV, tokens_BN, parents_BN), drawn


def both(inputs, **options):
    uniforms_BN = torch.rand(ROWS, len(TREE), generator=torch.Generator().manual_seed(9))
    options |= {"rule": "sampling", "uniforms_BN": uniforms_BN.double(), "max_depth": TREE.depth}
    return [verifier(*inputs, **options) for verifier in (verify, verify_on_cpu)]


def assert_equal(expected, found):
    assert torch.equal(found.path_BL, expected.path_BL)
    assert torch.equal(found.num_accepted_B, expected.num_accepted_B)
    assert torch.equal(found.next_token_B, expected.next_token_B)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("num_tokens", [VOCAB, 300])
def test_drawn_drafts_end_where_the_specification_ends(num_tokens, filters):
    inputs, drawn = case(num_tokens)
    expected, found = both(inputs, drawn=drawn, **filters)
    assert_equal(expected, found)
    assert len(set(expected.num_accepted_B.tolist())) > 1
    assert (expected.next_token_B >= 768).any()  # of the last block, which is not full


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_given_drafts_end_where_the_specification_ends(filters):
    inputs, _ = case(VOCAB)
    assert_equal(*both(inputs, **filters))


def test_copies_among_siblings_and_padding():
    (logits_BNV, tokens_BN, parents_BN), _ = case(VOCAB, seed=1)
    tokens_BN[:, 3] = tokens_BN[:, 1]
    parents_BN = parents_BN.clone()
    parents_BN[::2, -1] = -1
    expected, found = both((logits_BNV, tokens_BN, parents_BN))
    assert_equal(expected, found)
    assert (expected.num_accepted_B == 1).any() and not (expected.path_BL == 3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precise_logits(dtype):
    """Sums of blocks round otherwise than one long sum: another token is a neighbour in it."""
    inputs, drawn = case(300)
    inputs = (inputs[0].to(dtype), *inputs[1:])
    expected, found = both(inputs, drawn=drawn)
    assert torch.equal(found.path_BL, expected.path_BL)
    assert (found.next_token_B == expected.next_token_B).float().mean() > 0.9


def test_all_tokens_of_a_row_are_found_with_their_weights():
    weights_1V = torch.zeros(1, 700, dtype=torch.float64)
    weights_1V[0, [3, 255, 256, 600]] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    places = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999, 7.0])
    found = token_at(weights_1V.expand(9, -1), places, weights_1V.expand(9, -1))
    assert found == [3, 3, 255, 255, 256, 256, 600, 600, 600]


def test_where_no_weight_is_left_the_likeliest_token_comes():
    p_RV = torch.rand(2, 300)
    p_RV[0, 299], p_RV[1, 5] = 2, 2
    assert token_at(torch.zeros(2, 300), torch.tensor([0.0, 0.5]), p_RV) == [299, 5]
