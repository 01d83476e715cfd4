"""`verify` against the same rules in plain Python, and its law against the backbone's."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_exp.decode import verify
from medusa_exp.decode.cpu_verify import verify_on_cpu
from medusa_exp.decode.distribution import probabilities

RULES = ("greedy", "sampling", "typical")
VOCAB = 4
BOTH = pytest.mark.parametrize("verifier", [verify, verify_on_cpu])


def children_of(node, parents, tokens):
    """Return the children, of copies the first."""
    seen, found = set(), []
    for child, parent in enumerate(parents):
        if parent == node and tokens[child] not in seen:
            seen.add(tokens[child])
            found.append(child)
    return found


def walk(rule, p, parents, tokens, uniforms):
    """The rules, one node after the other; p are the probabilities after each node."""
    if rule == "typical":
        return typical(p, parents, tokens)
    path, node = [0], 0
    while True:
        children = children_of(node, parents, tokens)
        if rule == "greedy":
            drawn = int(np.argmax(p[node]))
        else:
            first = [tokens[c] for c in children]
            order = first + [t for t in range(VOCAB) if t not in first]
            ends = np.cumsum([p[node][t] for t in order])
            place = int(np.searchsorted(ends, uniforms[node], side="right"))
            drawn = order[min(place, max(i for i, t in enumerate(order) if p[node][t] > 0))]
        following = [c for c in children if tokens[c] == drawn]
        if not following:
            return path, drawn
        node = following[0]
        path.append(node)


def typical(p, parents, tokens, epsilon=0.09, alpha=0.3):
    def threshold(node):
        entropy = -sum(x * math.log(x) for x in p[node] if x > 0)
        return min(epsilon, alpha * math.exp(-entropy))

    best, lines = (1, 0.0, 0), {0: ([0], 0.0)}
    for node in range(1, len(parents)):
        parent = parents[node]
        if parent not in lines or node not in children_of(parent, parents, tokens):
            continue
        chance = p[parent][tokens[node]]
        if chance > threshold(parent):
            line, score = lines[parent]
            lines[node] = ([*line, node], score + math.log(chance))
            best = max(best, (len(line) + 1, lines[node][1], -node))
    line, _ = lines[-best[2]]
    return line, int(np.argmax(p[line[-1]]))


@st.composite
def trees(draw):
    size = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, i - 1)) for i in range(1, size))]
    token = st.integers(0, VOCAB - 1)  # few, so that paths are accepted and siblings repeat
    tokens = [draw(token) for _ in range(size)]
    logit = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, 5.0])
    logits = [[draw(logit) for _ in range(VOCAB)] for _ in range(size)]
    uniforms = [draw(st.integers(0, 999)) / 1000 + 0.0003 for _ in range(size)]
    return parents, tokens, logits, uniforms


@pytest.mark.parametrize("rule", RULES)
@BOTH
@settings(max_examples=200)
@given(rows=st.lists(trees(), min_size=1, max_size=3))
def test_equals_a_walk_in_plain_python(verifier, rule, rows):
    size = max(len(parents) for parents, *_ in rows)

    def padded(values, filler):
        return [[*value, *[filler] * (size - len(value))] for value in values]

    parents, tokens, logits, uniforms = zip(*rows, strict=True)
    logits_BNV = torch.tensor(padded(logits, [0.0] * VOCAB), dtype=torch.float64)
    verdict = verifier(
        logits_BNV,
        torch.tensor(padded(tokens, 0)),
        torch.tensor(padded(parents, -1)),
        rule=rule,
        uniforms_BN=torch.tensor(padded(uniforms, 0.5), dtype=torch.float64),
    )
    p_BNV = probabilities(logits_BNV, 1.0).numpy()
    for b, (parents_N, tokens_N, _, uniforms_N) in enumerate(rows):
        path, next_token = walk(rule, p_BNV[b], parents_N, tokens_N, uniforms_N)
        assert [n for n in verdict.path_BL[b].tolist() if n >= 0] == path
        assert verdict.num_accepted_B[b] == len(path) - 1
        assert verdict.next_token_B[b] == next_token
    assert verdict.path_BL.shape == (len(rows), size)


def random_tree(rng, size, vocab):
    """Return parents and tokens of a tree, copies among siblings included."""
    parents = [-1, *(int(rng.integers(0, n)) for n in range(1, size))]
    return parents, rng.integers(0, vocab, size).tolist()


def pieces_of(p_V, first):
    """Return middles and lengths of the intervals of [0, 1) on which the outcome is the same."""
    ends = np.cumsum([p_V[t] for t in first] + [p_V[t] for t in range(len(p_V)) if t not in first])
    edges = np.unique(np.clip([0.0, *ends, 1.0], 0.0, 1.0))
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_the_law_of_a_step_is_the_backbones(verifier, seed):
    """Every outcome of the uniforms is enumerated: what is committed has the probability that the
    backbone, token by token, gives it."""
    rng = np.random.default_rng(seed)
    size, vocab = 1 + seed % 4, 8
    parents, tokens = random_tree(rng, size, vocab)
    options = [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.5}][seed % 4]
    logits_NV = torch.from_numpy(rng.normal(0, 2, (size, vocab)))
    filters = {"temperature": 1.0, **options}
    p_NV = probabilities(logits_NV, **filters).numpy()
    parts = []
    for node in range(size):
        first = [tokens[child] for child in children_of(node, parents, tokens)]
        parts.append(pieces_of(p_NV[node], first))
    uniforms = np.array(list(itertools.product(*(middles for middles, _ in parts))))
    weights = np.prod(list(itertools.product(*(lengths for _, lengths in parts))), axis=1)
    count = len(uniforms)
    verdict = verifier(
        logits_NV.expand(count, -1, -1),
        torch.tensor([tokens]).expand(count, -1),
        torch.tensor([parents]).expand(count, -1),
        rule="sampling",
        uniforms_BN=torch.from_numpy(uniforms),
        **options,
    )
    found: dict[tuple[int, ...], float] = {}
    ends: dict[tuple[int, ...], list[int]] = {}
    for path_L, token, weight in zip(
        verdict.path_BL.tolist(), verdict.next_token_B.tolist(), weights, strict=True
    ):
        path = [node for node in path_L if node >= 0]
        said = (*(tokens[node] for node in path[1:]), token)
        found[said] = found.get(said, 0.0) + weight
        ends[said] = path
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    distance = 0.0
    for said, probability in found.items():
        law = math.prod(p_NV[node][t] for node, t in zip(ends[said], said, strict=True))
        distance += abs(law - probability) / 2
    assert distance <= 1e-12


@BOTH
def test_ties_go_to_the_lowest_id_and_the_first_sibling(verifier):
    logits_BNV = torch.tensor([[[1.0, 1.0, 0.0]] * 4])
    verdict = verifier(logits_BNV, torch.tensor([[2, 1, 0, 0]]), torch.tensor([[-1, 0, 0, 0]]))
    assert verdict.path_BL.tolist() == [[0, 2, -1, -1]]
    assert verdict.next_token_B.tolist() == [0]


@BOTH
@pytest.mark.parametrize("rule", RULES)
def test_padding_is_never_accepted(verifier, rule):
    """The reference takes padding for token 0, and accepts it where token 0 is likely."""
    logits_BNV = torch.zeros(1, 3, 4)
    logits_BNV[..., 0] = 9.0
    verdict = verifier(
        logits_BNV,
        torch.tensor([[3, 0, 0]]),
        torch.tensor([[-1, 0, -1]]),
        rule=rule,
        uniforms_BN=torch.full((1, 3), 0.1),
    )
    assert verdict.path_BL.tolist() == [[0, 1, -1]]


@BOTH
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_have_a_defined_end(verifier, rule, value):
    logits_BNV = torch.zeros(2, 4, 3)
    logits_BNV[0] = value
    logits_BNV[1, :, 2] = value
    verdict = verifier(
        logits_BNV,
        torch.tensor([[1, 0, 2, 0]] * 2),
        torch.tensor([[-1, 0, 0, 1]] * 2),
        rule=rule,
        uniforms_BN=torch.tensor([[0.999, 0.0, 0.5, 0.3]] * 2),
    )
    assert verdict.path_BL[:, 0].tolist() == [0, 0]
    assert ((verdict.next_token_B >= 0) & (verdict.next_token_B < 3)).all()
    if value != math.inf and rule == "greedy":
        assert verdict.next_token_B[0] == 0 and verdict.path_BL[0].tolist() == [0, 1, 3, -1]
    if value == math.inf and rule == "greedy":
        assert verdict.path_BL[1].tolist() == [0, 2, -1, -1]


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nucleus"}, "use one of greedy, sampling, typical"),
        ({"rule": "sampling"}, "needs uniforms_BN"),
        ({"rule": "typical", "temperature": 0.0}, "temperature above 0"),
    ],
)
def test_what_cannot_be_asked(verifier, options, message):
    with pytest.raises(ValueError, match=message):
        verifier(torch.zeros(1, 1, 2), torch.tensor([[0]]), torch.tensor([[-1]]), **options)
