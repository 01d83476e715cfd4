"""Traversal verification: the law of what a step commits, by enumeration of all its draws."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FixedHeads, build_model

from medusa_exp.decode import cpu_verify, verify
from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.sampled import Drawn, children_of, draw, in_draw_order
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree

CHUNK, VOCAB = 50_000, 1000


def pieces_of(edges):
    """Return the middles and lengths of what lies between edges in [0, 1]."""
    edges = np.unique(np.clip([0.0, *edges, 1.0], 0, 1))
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    return [(m, n) for m, n in zip(middles, lengths, strict=True) if n > 1e-15]


def edges_of(start, length):
    """Return places just inside both ends of a piece, and the halves of its length."""
    if length < 1e-6:  # where the ends would be rounded
        return [(start + length / 2, length)]
    return [(start + length * share, length / 2) for share in (1e-9, 1 - 1e-9)]


def law_of_draws(q_V, number):
    """Yield uniforms and their weight, such that all outcomes of so many draws are there."""
    if not number or not q_V.sum():
        yield (0.5,) * number, 1.0
        return
    ends = np.cumsum(q_V) / q_V.sum()
    for middle, length in pieces_of(ends):
        left = q_V.copy()
        left[min(np.searchsorted(ends, middle, side="right"), len(q_V) - 1)] = 0
        for others, weight in law_of_draws(left, number - 1):
            yield (middle, *others), length * weight


def attempts_of(children, p_of, q_of, tokens):
    """Traversal as the paper writes it: nodes in the order in which they are tried, with the
    probability that each is kept then, and what is left of p there."""
    found = []

    def visit(node, weight):
        p, q = p_of(node).copy(), q_of(node).copy() if children[node] else None
        for child in children[node]:
            token = tokens[child]
            if q[token] > 0:
                visit(child, min(1.0, weight * p[token] / q[token]))
                rest = np.maximum(weight * p - q, 0)
                left = rest.sum()
                weight = left / (left + 1 - weight) if weight < 1 else 1.0
                p = rest / left if left > 0 else p
                q[token] = 0
                q = q / q.sum() if q.sum() > 0 else q
        found.append((node, weight if node else 1.0, p))

    visit(0, 1.0)
    return found


def length_node_by_node(children, p_of, q_of, tokens, node=0):
    """Return how many draft tokens recursive rejection accepts on average."""
    p, q, is_open, length = p_of(node).copy(), q_of(node).copy(), 1.0, 0.0
    for child in children[node]:
        token = tokens[child]
        if q[token] > 0:
            share = min(1.0, p[token] / q[token])
            below = length_node_by_node(children, p_of, q_of, tokens, child)
            length += is_open * share * (1 + below)
            is_open *= 1 - share
            rest = np.maximum(p - q, 0)
            p = rest / rest.sum() if rest.sum() > 0 else p
            q[token] = 0
            q = q / q.sum() if q.sum() > 0 else q
    return length


def all_drafts(drafter, tree, hidden_1D):
    """Return drafts of all outcomes of the draws, and their weights; depth by depth."""
    size, children = len(tree), children_of(tree)
    inner = [node for node in range(size) if children[node]]
    inner.sort(key=lambda node: (tree.depths[node], node))
    starts, start = {}, size
    for depth in range(tree.depth):
        at = [place for place, node in enumerate(inner) if tree.depths[node] == depth]
        ranks = max(len(children[inner[place]]) for place in at)
        starts |= {place: start + i * ranks for i, place in enumerate(at)}
        start += len(at) * ranks
    rows = [([0.5] * drafter.num_uniforms, 1.0)]

    def drafts_of(rows):
        numbers = torch.tensor([numbers for numbers, _ in rows], dtype=torch.float64)
        root_B = torch.zeros(len(rows), dtype=torch.long)
        return drafter(root_B, hidden_1D.expand(len(rows), -1), numbers)

    for depth in range(tree.depth):
        drawn = drafts_of(rows).drawn
        following = []
        for (numbers, weight), q_QW in zip(rows, drawn.q_BQW.numpy(), strict=True):
            at = [place for place, node in enumerate(inner) if tree.depths[node] == depth]
            laws = []
            for place in at:
                q_W = q_QW[drawn.q_index[inner[place]]]
                laws.append([*law_of_draws(q_W, len(children[inner[place]]))])
            for combined in itertools.product(*laws):
                new = list(numbers)
                for place, (draws, _) in zip(at, combined, strict=True):
                    new[starts[place] : starts[place] + len(draws)] = draws
                following.append((new, weight * math.prod(one for _, one in combined)))
        rows = following
    return drafts_of(rows), [weight for _, weight in rows]


@torch.no_grad()
def law_of_a_step(verifier, drafter, rule, tree, logits_DVV, hidden_1D):
    """Return what a step can commit, with its probability, what the backbone says, and the accepted
    tokens that recursive rejection would make. The logits after a node are by depth and token."""
    filters = {name: getattr(rule, name) for name in ("temperature", "top_k", "top_p")}
    p_DVV = probabilities(logits_DVV, *filters.values()).numpy()
    draft, draft_weights = all_drafts(drafter, tree, hidden_1D)
    children, vocab = children_of(tree), logits_DVV.shape[-1]
    token_map = slice(None) if draft.drawn.token_map is None else draft.drawn.token_map.numpy()
    tokens_BN, q_BQW = draft.tokens_BN.tolist(), draft.drawn.q_BQW.numpy()
    work, node_by_node = [], 0.0
    for row, weight in enumerate(draft_weights):

        def q_of(node, row=row):
            q_V = np.zeros(vocab)
            q_V[token_map] = q_BQW[row, draft.drawn.q_index[node]]
            return q_V

        def p_of(node, row=row):
            return p_DVV[tree.depths[node], tokens_BN[row][node]]

        numbers = [0.5] * len(tree)
        node_by_node += weight * length_node_by_node(children, p_of, q_of, tokens_BN[row])
        for node, kept, p_V in attempts_of(children, p_of, q_of, tokens_BN[row]):
            for middle, length in pieces_of(np.cumsum(p_V)):
                for place, half in edges_of(middle - length / 2, length):
                    mine = [place, *numbers[1:]]
                    if node:
                        mine[node] = kept * (1 - 1e-9)
                    work.append((row, mine, weight * kept * half))
            numbers[node] = kept + (1 - kept) * 1e-9
            weight *= 1 - kept
            if weight < 1e-18:
                break
    logits_BNV = logits_DVV[torch.from_numpy(tree.depths), draft.tokens_BN]
    found = {}
    for start in range(0, len(work), CHUNK):
        part = work[start : start + CHUNK]
        rows = torch.tensor([row for row, *_ in part])
        verdict = verifier(
            logits_BNV[rows],
            draft.tokens_BN[rows],
            draft.parents_BN[rows],
            rule="sampling",
            uniforms_BN=torch.tensor([numbers for _, numbers, _ in part], dtype=torch.float64),
            max_depth=tree.depth,
            drawn=replace(draft.drawn, q_BQW=draft.drawn.q_BQW[rows]),
            **filters,
        )
        for (row, _, weight), path, token in zip(
            part, verdict.path_BL.tolist(), verdict.next_token_B.tolist(), strict=True
        ):
            said = (*(tokens_BN[row][n] for n in path[1:] if n >= 0), token)
            found.setdefault(said, []).append(weight)
    return {said: math.fsum(some) for said, some in found.items()}, p_DVV, node_by_node


def distance_from_the_backbones(law, p_DVV):
    """Return the total variation of what is committed, and goes on as the backbone does."""
    depth, vocab = p_DVV.shape[:2]

    def goes_on(before, weight, total):
        if len(before) == depth:
            total[before] += weight
            return
        for token, p in enumerate(p_DVV[len(before), before[-1] if before else 0]):
            goes_on((*before, token), weight * p, total)

    found, expected = np.zeros((2, *(vocab,) * depth))
    for said, weight in law.items():
        goes_on(said, weight, found)
    goes_on((), 1.0, expected)
    return np.abs(found - expected).sum() / 2


SMALL = [(0,), (1,), (0, 0)]
KINDS = {
    "parallel": (8, SMALL),
    "parallel, a wide tree": (6, [(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "parallel, deep": (4, [(0,), (1,), (0, 0), (1, 0), (0, 0, 0)]),
    "few tokens": (8, SMALL),
    "hydra": (6, [(0,), (1,), (0, 0), (1, 0)]),
    "recurrent": (8, SMALL),
}
FILTERS = [{}, {"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}, {"top_k": 1}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_law_of_a_step_is_the_backbones(kind, filters):
    """What a step commits, continued by the backbone, is distributed as the backbone's tokens; and
    it is more than recursive rejection would accept."""
    rng = np.random.default_rng(len(kind) + len(str(filters)))
    rule = AcceptanceRule("sampling", draft="sampled", **filters)
    (vocab, paths), hidden_1D = KINDS[kind], torch.zeros(1, 16, dtype=torch.float64)
    tree = Tree.from_paths(paths)
    if kind.startswith("parallel"):
        heads = FixedHeads(torch.from_numpy(rng.normal(0, 1.5, (tree.depth, vocab))))
    else:
        backbone = Backbone(build_model("llama", vocab_size=vocab, spread=1.5))
        counts = torch.tensor([1, 3, 0, 5, 0, 0, 2, 4])  # the head vocabulary is 0, 1, 3, 6, 7
        few = {"kind": "medusa_lowrank", "num_tokens": 5, "token_counts": counts}
        options = few if kind == "few tokens" else {"kind": kind}
        heads = build_heads(backbone, num_heads=2, **options).double()
        hidden_1D = torch.from_numpy(rng.normal(0, 1, (1, backbone.hidden_size)))
    logits_DVV = torch.from_numpy(rng.normal(0, 1.5, (tree.depth + 1, vocab, vocab)))
    drafter = build_drafter(heads, tree, torch.device("cpu"), rule)
    law, p_DVV, node_by_node = law_of_a_step(verify, drafter, rule, tree, logits_DVV, hidden_1D)
    assert math.fsum(law.values()) == pytest.approx(1, abs=1e-12)
    assert distance_from_the_backbones(law, p_DVV) <= 1e-12
    accepted = math.fsum((len(said) - 1) * weight for said, weight in law.items())
    assert accepted > node_by_node - 1e-12
    assert filters or accepted > 1.005 * node_by_node


def random_case(num_rows, vocab, num_tokens, dtype=torch.float64):
    """Return logits, tokens and parents of a tree, its draw from heads that know something, and the
    options of `verify`."""
    generator = torch.Generator().manual_seed(0)
    tree = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
    tree = in_draw_order(tree)
    children = children_of(tree)
    shape = num_rows, len(tree)
    logits_BNV = 3 * torch.randn(*shape, vocab, generator=generator).to(dtype)
    token_map = torch.randperm(vocab, generator=generator)[:num_tokens]
    noise_BNW = torch.randn(*shape, num_tokens, generator=generator)
    q_BNW = (logits_BNV[:, :, token_map] + 2 * noise_BNW).to(
        torch.promote_types(dtype, torch.float32)
    )
    q_BNW = q_BNW.softmax(-1)
    tokens_BN = torch.zeros(shape, dtype=torch.long)
    for node, some in enumerate(children):
        uniforms = torch.rand(num_rows, len(some), generator=generator)
        if some:
            tokens_BN[:, some] = token_map[draw(q_BNW[:, node], uniforms)]
    parents_BN = torch.tensor([tree.parents]).expand(num_rows, -1)
    uniforms_BN = torch.rand(shape, generator=generator).to(q_BNW.dtype)
    options = {"rule": "sampling", "uniforms_BN": uniforms_BN, "max_depth": tree.depth}
    drawn = Drawn(q_BNW, tuple(range(len(tree))), children, token_map)
    return (logits_BNV, tokens_BN, parents_BN), drawn, options


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_head_vocabulary_ends_where_all_tokens_would(filters):
    """q of tokens that heads cannot propose is 0; alone, a row ends where it does in a batch."""
    inputs, drawn, options = random_case(40, VOCAB, 300)
    found = verify(*inputs, drawn=drawn, **options, **filters)
    q_BNV = torch.zeros_like(inputs[0]).index_copy(2, drawn.token_map, drawn.q_BQW)
    of_all = replace(drawn, q_BQW=q_BNV, token_map=None)
    expected = verify(*inputs, drawn=of_all, **options, **filters)
    assert torch.equal(found.path_BL, expected.path_BL)
    assert torch.equal(found.next_token_B, expected.next_token_B)
    assert len(set(found.num_accepted_B.tolist())) > 1
    numbers = options.pop("uniforms_BN")
    for row in range(5):
        mine = slice(row, row + 1)
        alone = verify(
            *(tensor[mine] for tensor in inputs),
            drawn=replace(drawn, q_BQW=drawn.q_BQW[mine]),
            uniforms_BN=numbers[mine],
            **options,
            **filters,
        )
        assert torch.equal(alone.path_BL, found.path_BL[mine])
        assert torch.equal(alone.next_token_B, found.next_token_B[mine])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("num_tokens", [VOCAB, 300])
def test_rows_on_a_cpu_end_where_the_specification_ends(monkeypatch, num_tokens, filters):
    monkeypatch.setattr(cpu_verify, "_FEW_ROWS", 200)
    inputs, drawn, options = random_case(200, VOCAB, num_tokens)
    drawn = replace(drawn, token_map=drawn.token_map if num_tokens < VOCAB else None)
    found = cpu_verify.verify_on_cpu(*inputs, drawn=drawn, **options, **filters)
    expected = verify(*inputs, drawn=drawn, **options, **filters)
    assert torch.equal(found.path_BL, expected.path_BL)
    assert torch.equal(found.num_accepted_B, expected.num_accepted_B)
    assert torch.equal(found.next_token_B, expected.next_token_B)
    assert len(set(found.num_accepted_B.tolist())) > 1
    assert (found.next_token_B >= 768).any()  # of the last block of a sum, which is not full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precise_logits_end_nearby(dtype):
    inputs, drawn, options = random_case(200, VOCAB, 300, dtype)
    found = verify(*inputs, drawn=drawn, **options)
    wide = replace(drawn, q_BQW=drawn.q_BQW.double())
    options["uniforms_BN"] = options["uniforms_BN"].double()
    expected = verify(inputs[0].double(), *inputs[1:], drawn=wide, **options)
    is_same_B = (found.path_BL == expected.path_BL).all(1)
    assert is_same_B.float().mean() > 0.97
    assert (found.next_token_B == expected.next_token_B)[is_same_B].float().mean() > 0.97
