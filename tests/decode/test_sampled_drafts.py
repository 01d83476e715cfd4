"""Sampled drafts: the law of the draws, what is left of two distributions, and whole steps."""

from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB_SIZE, FixedHeads

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.replay import _ranks
from medusa_exp.decode.rule import AcceptanceRule, Verifier
from medusa_exp.decode.sampled import Rejection, draw
from medusa_exp.decode.slots import Request
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads
from medusa_exp.tree import Tree

VOCAB = 8
TREE = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
SAMPLED = AcceptanceRule("sampling", seed=3, draft="sampled")


@pytest.mark.parametrize("sure", [1.0, 30.0])
def test_children_have_the_law_of_draws_without_replacement(sure):
    """Also where a head is so sure of a token that the others together are a rounding error."""
    q_V = torch.softmax(torch.tensor([sure, 0.3, 0.1, -0.5, -torch.inf]), -1)
    uniforms = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(1))
    drawn = draw(q_V.expand(len(uniforms), -1), uniforms)
    assert all(len(set(row)) == 3 and 4 not in row for row in drawn[:500].tolist())
    of_first = drawn[drawn[:, 0] == 0]
    share = torch.bincount(of_first[:, 1], minlength=5) / len(of_first)
    rest = torch.softmax(torch.tensor([-torch.inf, 0.3, 0.1, -0.5, -torch.inf]), -1)
    assert (share - rest).abs().max() < 0.01


def test_a_draw_from_too_few_tokens_is_never_accepted():
    q_1V = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    [tokens] = draw(q_1V, torch.tensor([[0.2, 0.4, 0.9]])).tolist()
    assert tokens[0] == 1
    left = Rejection(torch.tensor([[0.3, 0.1, 0.3, 0.3]]), q_1V)
    weights = []
    for token in tokens:
        weights.append(float(left.child_weight(torch.tensor([[token]]))))
        left.fail(torch.tensor([[token]]))
    assert weights == [pytest.approx(0.1), 0, 0]
    assert left.rest()[0].tolist() == pytest.approx([0.3, 0, 0.3, 0.3])


def test_a_token_that_the_head_cannot_draw_changes_nothing():
    p_1V, q_1V = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    left, token_11 = Rejection(p_1V, q_1V, torch.tensor([[0.7]])), torch.tensor([[3]])
    assert left.child_weight(token_11).tolist() == [[0]]
    left.fail(token_11)
    assert left.weight.tolist() == [[pytest.approx(0.7)]] and left.factor.tolist() == [[0]]
    assert torch.equal(left.rest(), p_1V)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0])
def test_the_rest_is_never_negative_in_float32(scale):
    """p and q that are nearly equal, or equal: what is left is clamped, and a token comes out."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 1, 50, generator=generator)
    q_BQW = torch.softmax(logits + scale * torch.randn(64, 1, 50, generator=generator), -1)
    tree = Tree.from_paths([(0,), (1,), (2,)])
    rule = AcceptanceRule("sampling", draft="sampled")
    drafter = build_drafter(FixedHeads(logits[:1, 0]), tree, torch.device("cpu"), rule)
    draft = drafter(torch.zeros(64, dtype=torch.long), torch.zeros(64, 2), torch.rand(64, 7))
    verdict = Verifier(SAMPLED, torch.device("cpu"))(
        logits.expand(-1, 4, -1).contiguous(),
        draft.tokens_BN,
        draft.parents_BN,
        1,
        draft.nodes,
        torch.rand(64, 7, generator=generator),
        replace(draft.drawn, q_BQW=q_BQW),
    )
    assert ((verdict.next_token_B >= 0) & (verdict.next_token_B < 50)).all()
    if scale == 1e-7:
        assert (verdict.num_accepted_B == 1).all()


@pytest.mark.parametrize("kind", ["medusa", "medusa_lowrank", "hydra", "rooted", "recurrent"])
def test_eager_and_fixed_steps_say_the_same(backbone, kind):
    """By the same seed: in batches, and in slots, where each request brings its own draws."""
    counts = torch.arange(VOCAB_SIZE) if kind == "medusa_lowrank" else None
    options = {} if counts is None else {"num_tokens": VOCAB_SIZE // 2, "token_counts": counts}
    heads = build_heads(backbone, num_heads=2, kind=kind, **options)
    prompts, limits = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], Limits(12)
    found = []
    for cuda_graph in (False, True):
        decoder = Decoder(backbone, heads, TREE, SAMPLED, cuda_graph=cuda_graph)
        batch = decoder.decode(prompts[:2], limits, tree=TREE)
        requests = [Request(ids, limits, 32, (5, n), n) for n, ids in enumerate(prompts)]
        slots = {
            count: {
                one.request.tag: one.response.tokens
                for one in decoder.slots(count, 32).decode(iter(requests))
            }
            for count in (1, 2)
        }
        assert slots[1] == slots[2]
        found.append(([row.tokens for row in batch], slots[1]))
    assert found[0] == found[1]
    accepted = [n for row in batch for n in row.accept_lengths]
    assert max(accepted) > 1


def test_a_dynamic_tree_is_refused(backbone):
    picked = replace(TREE, num_picked=3)
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), picked, SAMPLED)
    with pytest.raises(UserError, match=r"tree=dynamic .* decode.draft=sampled"):
        decoder.decode([[1, 2]], Limits(4))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": "greedy", "draft": "sampled"}, "rule=sampling"),
        ({"name": "sampling", "draft": "drawn"}, "not one of"),
    ],
)
def test_rules_that_cannot_be(options, error):
    with pytest.raises(ValueError, match=error):
        AcceptanceRule(**options)


@pytest.mark.parametrize("seed", range(3))
def test_replayed_ranks_have_the_law_of_recursive_rejection(seed):
    """The token that comes, drawn by p, and then its rank: against drawing and verifying."""
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = torch.softmax(1.5 * torch.randn(2, 6, generator=generator), -1)
    count, number = 60_000, 3
    p_BV, q_BV = p_V.expand(count, -1), q_V.expand(count, -1)
    truth_B = torch.multinomial(p_V, count, replacement=True, generator=generator)
    ranks_B = _ranks(p_BV, q_BV, truth_B, number, generator)
    left, tokens_BR = Rejection(p_BV, q_BV), draw(q_BV, torch.rand(count, 3, generator=generator))
    expected, open_B1 = torch.zeros(6, number), torch.ones(count, 1)
    for rank in range(number):
        token_B1 = tokens_BR[:, rank : rank + 1]
        weight_B1 = left.child_weight(token_B1)
        accepted_B1, open_B1 = open_B1 * weight_B1, open_B1 * (1 - weight_B1)
        left.fail(token_B1)
        expected[:, rank] = torch.zeros(6).scatter_add_(0, token_B1[:, 0], accepted_B1[:, 0])
    found = torch.zeros(6, number + 1)
    found.index_put_((truth_B, ranks_B), torch.ones(count), accumulate=True)
    assert ((found[:, :number] - expected) / count).abs().max() < 0.006
    assert expected[:, 1].sum() > 0.02 * count
