import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_exp.decode import verify


def walk(target, tokens, parents):
    """The specification in plain Python: go down while a child holds the backbone's token."""
    path, node = [0], 0
    while True:
        children = [i for i, p in enumerate(parents) if p == node and tokens[i] == target[node]]
        if not children:
            return path, target[node]
        node = children[0]
        path.append(node)


@st.composite
def trees(draw):
    size = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, i - 1)) for i in range(1, size))]
    token = st.integers(0, 2)  # few, so that paths are accepted and siblings repeat
    tokens = [draw(token) for _ in range(size)]
    target = [draw(token) for _ in range(size)]
    return parents, tokens, target


@settings(max_examples=200, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=3))
def test_equals_a_walk_in_plain_python(rows):
    size = max(len(parents) for parents, _, _ in rows)
    pad = [(p + [-1] * (size - len(p)), t, y) for p, t, y in rows]
    parents_BN = torch.tensor([p for p, _, _ in pad])
    tokens_BN = torch.tensor([t + [0] * (size - len(t)) for _, t, _ in pad])
    logits_BNV = torch.zeros(len(rows), size, 3)
    for b, (_, _, target) in enumerate(rows):
        for n, y in enumerate(target):
            logits_BNV[b, n, y] = 1.0
    verdict = verify(logits_BNV, tokens_BN, parents_BN)
    for b, (parents, tokens, target) in enumerate(rows):
        path, next_token = walk(target, tokens, parents)
        assert [n for n in verdict.path_BL[b].tolist() if n >= 0] == path
        assert verdict.num_accepted_B[b] == len(path) - 1
        assert verdict.next_token_B[b] == next_token


def test_ties_go_to_the_lowest_id_and_the_first_sibling():
    logits_BNV = torch.tensor([[[1.0, 1.0, 0.0]] * 4])
    verdict = verify(logits_BNV, torch.tensor([[2, 1, 0, 0]]), torch.tensor([[-1, 0, 0, 0]]))
    assert verdict.path_BL.tolist() == [[0, 2, -1, -1]]
    assert verdict.next_token_B.tolist() == [0]


def test_padding_is_never_accepted():
    """The reference takes padding for token 0, and accepts it where token 0 is likely."""
    logits_BNV = torch.zeros(1, 3, 4)
    logits_BNV[..., 0] = 1.0
    verdict = verify(logits_BNV, torch.tensor([[3, 0, 0]]), torch.tensor([[-1, 0, -1]]))
    assert verdict.path_BL.tolist() == [[0, 1, -1]]
