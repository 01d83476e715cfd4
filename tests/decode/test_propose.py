"""Heads that say what no trained head should say."""

import math

import pytest
import torch
from tiny_models import VOCAB_SIZE

from medusa_exp.decode import generate
from medusa_exp.decode.answers import Limits
from medusa_exp.decode.loop import decode_plain
from medusa_exp.tree import Tree


class BrokenHeads(torch.nn.Module):
    """Stub heads that guess tokens of an answer, and have one value in place of most logits."""

    num_heads = 3

    def __init__(self, answer: list[int], value: float) -> None:
        super().__init__()
        self.answer, self.value = sorted(set(answer)), value
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, hidden_BD):
        shape = (len(hidden_BD), self.num_heads, VOCAB_SIZE)
        logits_BKV = torch.randn(shape, generator=self.generator)
        logits_BKV[..., self.answer] += 4
        is_broken_BKV = torch.rand(shape, generator=self.generator) < 0.9
        return logits_BKV.masked_fill(is_broken_BKV, self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_picked", [None, 20])
def test_guesses_that_are_no_numbers_change_no_answer(backbone, value, num_picked):
    prompt = [5, 6, 7]
    [plain] = decode_plain(backbone, [prompt], Limits(30))
    ranks = range(4)
    tree = Tree.from_paths(
        [(i,) for i in ranks]
        + [(i, j) for i in ranks for j in ranks]
        + [(i, j, k) for i in ranks for j in ranks for k in ranks]
    )
    tree = Tree(tree.parents, tree.ranks, num_picked)
    heads = BrokenHeads(plain.tokens, value)
    ours = generate(backbone, heads, torch.tensor([prompt]), tree=tree, max_new_tokens=30)
    assert ours.sequences == [plain.tokens]
