"""Drafts: nodes that are picked, and heads that say what no trained head should."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB_SIZE

from medusa_exp.decode import generate
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import DynamicTreeDrafter, build_drafter
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.tree import Tree, chain


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
        draft = DynamicTreeDrafter(heads, choices, 7, backbone.device)(
            torch.tensor([1, 2, 3]), hidden_BD
        )
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


class WithAllLogits(torch.nn.Module):
    """The same heads, as foreign ones that have a logit for each token of the vocabulary."""

    def __init__(self, heads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, hidden_BD):
        return self.heads(hidden_BD)


@pytest.mark.parametrize("draft", ["top", "sampled", "dynamic"])
@pytest.mark.parametrize("is_stacked", [True, False])
def test_drafts_of_a_head_vocabulary_are_those_of_all_logits(backbone, draft, is_stacked):
    draws = torch.Generator().manual_seed(0)
    heads = build_heads(
        backbone,
        **{"num_heads": 2, "kind": "medusa_lowrank", "num_tokens": 9},
        token_counts=torch.rand(backbone.vocab_size, generator=draws),
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws))
    ours = stack_heads(heads, backbone) if is_stacked else heads
    tree = Tree.from_paths([(i,) for i in range(3)] + [(0, i) for i in range(3)])
    rule = GREEDY
    if draft == "sampled":
        rule = AcceptanceRule("sampling", temperature=0.8, top_k=7, draft="sampled")
    if draft == "dynamic":
        tree = replace(tree, num_picked=5)
    hidden_BD, root_B = torch.randn(4, backbone.hidden_size, generator=draws), torch.arange(4)
    both = [
        build_drafter(some, tree, backbone.device, rule) for some in (ours, WithAllLogits(heads))
    ]
    uniforms_BU = torch.rand(4, both[0].num_uniforms, generator=draws)
    with torch.inference_mode():
        few, all_ = (drafter(root_B, hidden_BD, uniforms_BU) for drafter in both)
    assert torch.equal(few.tokens_BN, all_.tokens_BN)
    assert set(few.tokens_BN[:, 1:].flatten().tolist()) <= set(heads.token_map.tolist())
    if draft == "sampled":
        assert few.drawn.token_map is heads.token_map
        q_BQV = torch.zeros_like(all_.drawn.q_BQW)
        q_BQV[..., heads.token_map] = few.drawn.q_BQW
        torch.testing.assert_close(q_BQV, all_.drawn.q_BQW)


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


class PlainHeads(torch.nn.Module):
    """Two heads that are no class of ours."""

    def forward(self, hidden_BD):
        return torch.zeros(len(hidden_BD), 2, VOCAB_SIZE)


@pytest.mark.parametrize("kind", ["medusa", "hydra", "rooted", "recurrent", "plain"])
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (chain(3), "the tree is 3 guesses deep, and there are 2 heads"),
        (Tree((-1, 0), (-1, VOCAB_SIZE)), "guess 65 of a head, and it has 64"),
    ],
)
def test_a_tree_of_guesses_that_the_heads_lack(backbone, kind, tree, message):
    heads = PlainHeads() if kind == "plain" else build_heads(backbone, num_heads=2, kind=kind)
    with pytest.raises(UserError, match=message):
        generate(backbone, heads, torch.tensor([[1, 2]]), tree=tree, max_new_tokens=4)


@pytest.mark.parametrize("kind", ["medusa_lowrank", "recurrent"])
def test_a_tree_of_guesses_beyond_the_head_vocabulary(backbone, kind):
    counts = torch.arange(VOCAB_SIZE)
    heads = build_heads(backbone, num_heads=2, kind=kind, num_tokens=9, token_counts=counts)
    ids = torch.tensor([[1, 2]])
    with pytest.raises(UserError, match="guess 10 of a head, and it has 9"):
        generate(backbone, heads, ids, tree=Tree((-1, 0), (-1, 9)), max_new_tokens=4)
    generate(backbone, heads, ids, tree=Tree((-1, 0), (-1, 8)), max_new_tokens=4)


def test_each_verifier_has_drafters_of_its_own(backbone):
    """A kernel may draft for one of them."""
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), chain(2))
    auto, by_torch = (
        decoder.drafter(rule=replace(GREEDY, verifier=name)) for name in ("auto", "torch")
    )
    assert auto is not by_torch and auto.key != by_torch.key
    assert decoder.drafter(rule=replace(GREEDY, verifier="auto")) is auto
