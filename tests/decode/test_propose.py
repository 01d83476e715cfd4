"""Drafts: trees of guesses that are picked anew at each step."""

import pytest
import torch

from medusa_exp import build_heads, generate
from medusa_exp.decode.propose import DynamicTree
from medusa_exp.tree import Tree


def test_a_picked_tree_has_the_likeliest_nodes(backbone):
    heads = build_heads(backbone, num_heads=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():  # fresh heads are copies of each other
            parameter.add_(torch.randn_like(parameter))
    choices = Tree.from_paths(
        [(i,) for i in range(4)] + [(i, j) for i in range(4) for j in range(4)]
    )
    hidden_BD = torch.randn(3, backbone.hidden_size)
    with torch.inference_mode():
        draft = DynamicTree(heads, choices, 7, backbone.device)(torch.tensor([1, 2, 3]), hidden_BD)
        p_BKV = heads(hidden_BD).softmax(-1)
    for b in range(3):
        top = [p_BKV[b, k].topk(4) for k in range(2)]
        chances = {(): 1.0}
        chances |= {(i,): float(top[0].values[i]) for i in range(4)}
        chances |= {
            (i, j): chances[(i,)] * float(top[1].values[j]) for i in range(4) for j in range(4)
        }
        best = sorted(chances, key=lambda path: -chances[path])[:7]
        expected = sorted([int(top[k].indices[r]) for k, r in enumerate(path)] for path in best)
        paths = []
        for node in range(7):
            path, at = [], node
            while at:
                path.append(int(draft.tokens_BN[b, at]))
                at = int(draft.parents_BN[b, at])
            paths.append(path[::-1])
            assert int(draft.depths_BN[b, node]) == len(path)
            assert int(draft.ancestors_BNN[b, node].sum()) == len(path) + 1
        assert sorted(paths) == expected


def at_random(x_BKV: torch.Tensor) -> torch.Tensor:
    return x_BKV


def one_head_of(value: float):
    def change(x_BKV: torch.Tensor) -> torch.Tensor:
        x_BKV[:, 1] = value
        return x_BKV

    return change


def two_tokens_alone(x_BKV: torch.Tensor) -> torch.Tensor:
    x_BKV[:, :, 2:] = -torch.inf
    return x_BKV


@pytest.mark.parametrize(
    "change",
    [at_random, one_head_of(torch.nan), one_head_of(-torch.inf), two_tokens_alone, torch.exp2],
    ids=["at random", "one NaN", "one -inf", "two tokens alone", "huge"],
)
@pytest.mark.parametrize("num_nodes", [2, 4, 9])
def test_heads_without_sense_do_not_change_the_answer(backbone, num_nodes, change):
    choices = Tree.from_paths(
        [(0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (0, 0, 0), (1, 0, 0)]
    )
    tree = Tree(choices.parents, choices.ranks, num_nodes)
    generator = torch.Generator().manual_seed(num_nodes)

    def heads(hidden_BD: torch.Tensor) -> torch.Tensor:
        logits_BKV = torch.randn(len(hidden_BD), 3, backbone.vocab_size, generator=generator)
        return change(30 * logits_BKV)

    ids = torch.tensor([[5, 6, 7, 8, 9]])
    said = [
        generate(backbone, heads, ids, tree=used, max_new_tokens=24, eos_token_id=[]).sequences
        for used in (Tree.from_paths([]), tree)
    ]
    assert said[0] == said[1]
