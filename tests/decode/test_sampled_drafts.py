"""Sampled drafts: the law of a step, of the draws, and of whole continuations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, build_model
from torch import nn

from medusa_exp.decode import verify
from medusa_exp.decode.cpu_verify import verify_on_cpu
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.replay import _ranks
from medusa_exp.decode.rule import AcceptanceRule, Verifier
from medusa_exp.decode.sampled import Rejection, draw
from medusa_exp.decode.slots import Request
from medusa_exp.decode.verify import probabilities
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree

VOCAB = 8
TREE = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
SAMPLED = AcceptanceRule("sampling", seed=3, draft="sampled")


class FixedHeads(nn.Module):
    """Heads that say the same everywhere."""

    def __init__(self, logits_KV):
        super().__init__()
        self.logits_KV = logits_KV

    def forward(self, hidden_BD):
        return self.logits_KV.expand(len(hidden_BD), -1, -1)


def pieces_of(edges):
    """Return the middles and lengths of what lies between edges in [0, 1]."""
    edges = np.unique(np.clip([0.0, *edges, 1.0], 0, 1))
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    return [(m, n) for m, n in zip(middles, lengths, strict=True) if n > 1e-15]


def law_of_draws(q_QV, number):
    """Yield uniforms and their weight, such that all outcomes of drawing by them are there."""
    if not number:
        yield (), 1.0
        return
    sums = [np.cumsum(q) / max(q.sum(), 1e-300) for q in q_QV]
    for middle, length in pieces_of(np.concatenate(sums)):
        left = [q.copy() for q in q_QV]
        for q, ends in zip(left, sums, strict=True):
            q[min(np.searchsorted(ends, middle, side="right"), len(q) - 1)] = 0
        for others, weight in law_of_draws(left, number - 1):
            yield (middle, *others), length * weight


def pieces_of_node(p, q, tokens):
    """Rejection as the papers write it: everything normalized anew after each child."""
    edges, is_open, p, q = [0.0], 1.0, p.copy(), q.copy()
    for token in tokens:
        if q[token] > 0:
            share = min(1.0, p[token] / q[token])
            edges.append(edges[-1] + is_open * share)
            is_open *= 1 - share
            rest = np.maximum(p - q, 0)
            p = rest / rest.sum() if rest.sum() > 0 else p
            q[token] = 0
            q = q / q.sum() if q.sum() > 0 else q
    return pieces_of([*edges, *(edges[-1] + is_open * np.cumsum(p))])


@torch.no_grad()
def law_of_a_step(verifier, drafter, rule, tree, logits_DVV, hidden_1D):
    """Return what a step can commit, with its probability, by enumeration of its draws.

    The backbone's logits after a node hang on its depth and its token.
    """
    size, filters = len(tree), (rule.temperature, rule.top_k, rule.top_p)
    p_DVV = probabilities(logits_DVV, *filters).numpy()
    number = (drafter.num_uniforms - size) // 2

    def drafts_of(draws):
        numbers = torch.tensor([[0.5] * size + [*one] for one in draws], dtype=torch.float64)
        root_B = torch.zeros(len(draws), dtype=torch.long)
        return drafter(root_B, hidden_1D.expand(len(draws), -1), numbers)

    [q_V] = drafts_of([[0.5] * 2 * number]).drawn.q_BQW[:, 0].numpy()
    firsts = [*law_of_draws([q_V], number)]
    of_firsts = drafts_of([[*one, *[0.5] * number] for one, _ in firsts]).drawn.q_BQW[:, 1:].numpy()
    draws, weights = [], []
    for (first, weight), q_QV in zip(firsts, of_firsts, strict=True):
        for second, more in law_of_draws([*q_QV], number):
            draws.append([*first, *second])
            weights.append(weight * more)
    draft = drafts_of(draws)
    tokens_BN, q_BQW = draft.tokens_BN.tolist(), draft.drawn.q_BQW.numpy()
    token_map = slice(None) if draft.drawn.token_map is None else draft.drawn.token_map.numpy()
    known = {}

    def pieces_at(row, node):
        children = [tokens_BN[row][c] for c in draft.drawn.children_NC[node].tolist() if c >= 0]
        key = node, tokens_BN[row][node], *children
        if key not in known:
            q_V = np.zeros(VOCAB)
            q_V[token_map] = q_BQW[row, draft.drawn.row_N[node] if children else 0]
            p_V = p_DVV[tree.depths[node], tokens_BN[row][node]]
            known[key] = pieces_of_node(p_V, q_V, children)
        return known[key]

    logits_BNV = logits_DVV[torch.from_numpy(tree.depths), draft.tokens_BN]
    found = {}
    work = [(row, [0.5] * size, weight, 0) for row, weight in enumerate(weights)]
    while work:
        work = [
            (row, [*numbers[:node], middle, *numbers[node + 1 :]], weight * length, node)
            for row, numbers, weight, node in work
            for middle, length in pieces_at(row, node)
        ]
        rows = torch.tensor([row for row, *_ in work])
        verdict = verifier(
            logits_BNV[rows],
            draft.tokens_BN[rows],
            draft.parents_BN[rows],
            rule="sampling",
            temperature=rule.temperature,
            top_k=rule.top_k,
            top_p=rule.top_p,
            uniforms_BN=torch.tensor([numbers for _, numbers, *_ in work], dtype=torch.float64),
            max_depth=2,
            drawn=replace(draft.drawn, q_BQW=draft.drawn.q_BQW[rows]),
        )
        following = []
        for (row, numbers, weight, node), path, token in zip(
            work, verdict.path_BL.tolist(), verdict.next_token_B.tolist(), strict=True
        ):
            path = [n for n in path if n >= 0]
            if path[-1] != node:
                following.append((row, numbers, weight, path[path.index(node) + 1]))
                continue
            said = (*(tokens_BN[row][n] for n in path[1:]), token)
            found.setdefault(said, []).append(weight)
        work = following
    return {said: math.fsum(some) for said, some in found.items()}, p_DVV


FILTERS = [{}, {"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}, {"top_k": 1}]


@pytest.mark.parametrize("verifier", [verify, verify_on_cpu])
@pytest.mark.parametrize("kind", ["parallel", "few tokens", "hydra", "recurrent"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_law_of_a_step_is_the_backbones(verifier, kind, filters):
    """Every outcome of the draws and of verification: given the tokens so far, the next one that is
    committed has the probability that the backbone gives it."""
    rng = np.random.default_rng(len(kind) + len(str(filters)))
    rule = AcceptanceRule("sampling", draft="sampled", **filters)
    tree, hidden_1D = TREE, torch.zeros(1, 16, dtype=torch.float64)
    if kind == "parallel":
        heads = FixedHeads(torch.from_numpy(rng.normal(0, 1.5, (2, VOCAB))))
    else:
        tree = Tree.from_paths([(0,), (0, 0)] + [(1,), (1, 0)] * (kind != "recurrent"))
        backbone = Backbone(build_model("llama", vocab_size=VOCAB, spread=1.5))
        counts = torch.tensor([1, 3, 0, 5, 0, 0, 2, 4])  # the head vocabulary is 0, 1, 3, 6, 7
        few = {"kind": "medusa_lowrank", "num_tokens": 5, "token_counts": counts}
        options = few if kind == "few tokens" else {"kind": kind}
        heads = build_heads(backbone, num_heads=2, **options).double()
        hidden_1D = torch.from_numpy(rng.normal(0, 1, (1, backbone.hidden_size)))
    logits_DVV = torch.from_numpy(rng.normal(0, 1.5, (tree.depth + 1, VOCAB, VOCAB)))
    drafter = build_drafter(heads, tree, torch.device("cpu"), rule)
    law, p_DVV = law_of_a_step(verifier, drafter, rule, tree, logits_DVV, hidden_1D)
    assert math.fsum(law.values()) == pytest.approx(1, abs=1e-12)
    distance = 0.0
    for depth in range(tree.depth + 1):
        found = {}
        for said, weight in law.items():
            if len(said) > depth:
                found.setdefault(said[:depth], np.zeros(VOCAB))[said[depth]] += weight
        for before, by_token in found.items():
            p_V = p_DVV[depth, before[-1] if before else 0]
            distance += np.abs(by_token - by_token.sum() * p_V).sum() / 2
    assert distance <= 1e-12
    assert "top_k" in filters or any(len(said) == 3 for said in law)


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
    accepted = [
        float(left.attempt(torch.tensor([[token]]), torch.tensor([[True]]))) for token in tokens
    ]
    assert accepted == [pytest.approx(0.1), 0, 0]
    assert left.rest()[0].tolist() == pytest.approx([0.3, 0, 0.3, 0.3])


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
        ({"name": "sampling", "draft": "sampled", "verifier": "cupy"}, "no kernel"),
    ],
)
def test_rules_that_cannot_be(options, error):
    with pytest.raises((ValueError, UserError), match=error):
        AcceptanceRule(**options)


@pytest.mark.parametrize("seed", range(3))
def test_replayed_ranks_have_the_law_of_decoding(seed):
    """The token that comes, drawn by p, and then its rank: against drawing and verifying."""
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = torch.softmax(1.5 * torch.randn(2, 6, generator=generator), -1)
    count, number = 60_000, 3
    p_BV, q_BV = p_V.expand(count, -1), q_V.expand(count, -1)
    truth_B = torch.multinomial(p_V, count, replacement=True, generator=generator)
    ranks_B = _ranks(p_BV, q_BV, truth_B, number, generator)
    left, tokens_BR = Rejection(p_BV, q_BV), draw(q_BV, torch.rand(count, 3, generator=generator))
    expected = torch.zeros(6, number)
    for rank in range(number):
        token_B1 = tokens_BR[:, rank : rank + 1]
        accepted_B1 = left.attempt(token_B1, torch.ones_like(token_B1, dtype=torch.bool))
        expected[:, rank] = torch.zeros(6).scatter_add_(0, token_B1[:, 0], accepted_B1[:, 0])
    found = torch.zeros(6, number + 1)
    found.index_put_((truth_B, ranks_B), torch.ones(count), accumulate=True)
    assert ((found[:, :number] - expected) / count).abs().max() < 0.006
    assert expected[:, 1].sum() > 0.02 * count
