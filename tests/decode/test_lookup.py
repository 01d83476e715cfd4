"""Looked-up branches: what is found in a text, how it is grafted, and that no answer changes."""

import random

import pytest
import torch
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.lookup import LookupDrafter, Text
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.recurrent import check_chain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.decode.verify import verify
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

TREE = Tree((-1, 0, 1, 2, 2, 1, 0, 6, 0), (-1, 0, 0, 0, 3, 1, 1, 0, 2), num_lookup=5)
TREES = {
    "fixed": TREE,
    "picked": Tree(TREE.parents, TREE.ranks, num_picked=5, num_lookup=3),
    "lookup alone": Tree((-1,), (-1,), num_lookup=6),
    "one node": Tree(TREE.parents, TREE.ranks, num_lookup=1),
}
FORMS = pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "fixed"])


def longest_match(tokens: list[int]) -> int:
    """Return the length of the longest end of a text that was said before, up to 4."""
    for length in (4, 3, 2, 1):
        end = tokens[-length:]
        if length < len(tokens) and any(
            tokens[i : i + length] == end for i in range(len(tokens) - length)
        ):
            return length
    return 0


def test_the_continuation_is_that_of_a_recent_match():
    assert Text([1, 2, 3, 4, 9, 2, 3]).continuation(3) == [4, 9, 2]
    assert Text([1, 2, 3, 7, 2, 3, 8, 2, 3]).continuation(2) == [8, 2]  # the most recent
    assert Text([5, 2, 3, 7, 2, 3, 8, 5, 2, 3]).continuation(1) == [7]  # the longest
    assert Text([4, 6]).continuation(3) == [6, 6, 6]  # none: harmless
    assert Text([1, 2, 1, 2, 1]).continuation(5) == [2, 1, 2, 1, 2]  # in circles


def test_matches_of_random_texts_against_a_search():
    rng = random.Random(0)
    for _ in range(300):
        said = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
        text = Text(said[:1])
        for end in range(2, len(said) + 1):
            text.extend(said[end - 1 : end])
            so_far, length = said[:end], longest_match(said[:end])
            if length == 0:
                assert text.continuation(2) == [so_far[-1]] * 2
                continue
            match = so_far[-length:]
            followers = {
                so_far[i + length]
                for i in range(len(so_far) - length)
                if so_far[i : i + length] == match
            }
            assert text.continuation(1)[0] in followers


def test_a_long_match_is_followed_past_the_tables():
    copied = list(range(10, 40))
    # The last four of it were said again, with another end: the longer match still counts.
    text = Text([*copied, *copied[16:20], 99, *copied[:20]])
    assert text.continuation(4) == copied[20:24]


def test_the_chain_leaves_the_heads_tree_where_they_part():
    """And no two siblings hold one token: then each rule of verification holds as it is."""
    torch.manual_seed(0)
    heads = torch.nn.Module()
    heads.forward = lambda hidden_BD: torch.randn(len(hidden_BD), 3, 6)
    plain = Tree(TREE.parents, TREE.ranks)
    drafter = LookupDrafter(
        build_drafter(heads, plain, torch.device("cpu")), 4, torch.device("cpu")
    )
    lengths = set()
    for _ in range(40):
        found_BL = torch.randint(0, 6, (8, drafter.depth))
        draft = drafter(torch.zeros(8, dtype=torch.long), torch.zeros(8, 2), None, found_BL)
        for row in range(8):
            tokens, parents = draft.tokens_BN[row].tolist(), draft.parents_BN[row].tolist()
            children = list(zip(parents[1:], tokens[1:], strict=True))
            assert len(set(children)) == len(children)
            path, node = [], len(tokens) - 1
            while node:
                path.append(tokens[node])
                node = parents[node]
            assert path[::-1] == found_BL[row, : len(path)].tolist() and len(path) >= 4
            assert draft.depths_BN[row, -1] == len(path)
            lengths.add(len(path))
        nodes = draft.nodes
        found = type(nodes)(draft.parents_BN, drafter.depth)
        assert torch.equal(found.ancestors_BNN, nodes.ancestors_BNN)
    assert lengths == {4, 5, 6, 7}


def test_law_of_a_step_by_enumeration():
    """The token after the root is distributed by p, whatever the branch: all uniforms of a grid."""
    size, num = 5, 4000
    torch.manual_seed(1)
    for found in range(size):
        logits_1NV = torch.randn(1, 4, size, dtype=torch.float64) * 2
        # Two of the heads' tokens below the root, and the looked-up one as it would be grafted.
        heads = [1, 3]
        parents = [-1, 0, 0, 0] if found not in heads else [-1, 0, 0, 1 + heads.index(found)]
        tokens_BN = torch.tensor([[0, *heads, found]]).expand(num, -1)
        uniforms_BN = ((torch.arange(num) + 0.5) / num).double()[:, None].expand(-1, 4)
        verdict = verify(
            logits_1NV.expand(num, -1, -1),
            tokens_BN,
            torch.tensor([parents]).expand(num, -1),
            rule="sampling",
            uniforms_BN=uniforms_BN,
        )
        first = tokens_BN.gather(1, verdict.path_BL[:, 1:2].clamp(min=0))[:, 0]
        first = torch.where(verdict.num_accepted_B > 0, first, verdict.next_token_B)
        share_V = torch.bincount(first, minlength=size) / num
        assert (share_V - logits_1NV[0, 0].softmax(-1)).abs().max() <= 1 / num + 1e-9


@FORMS
@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        *(("medusa", tree) for tree in TREES.values()),
        ("hydra", TREE),
        ("rooted", TREE),
        ("recurrent", TREE),
    ],
    ids=[*TREES, "hydra", "rooted", "recurrent"],
)
def test_equal_to_plain_decoding(backbone, kind, tree, cuda_graph):
    rng = random.Random(kind)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))] for _ in range(3)]
    prompts = [prompt * 2 for prompt in prompts]
    limits = Limits(20, {3})
    expected = [decode_plain(backbone, [prompt], limits)[0].tokens for prompt in prompts]
    heads = build_heads(backbone, num_heads=3, kind=kind)
    decoder = Decoder(backbone, heads, tree, limits=limits, cuda_graph=cuda_graph)
    assert [one.tokens for one in decoder.decode(prompts)] == expected
    requests = [Request(prompt, limits, tag=i) for i, prompt in enumerate(prompts)]
    found = {
        done.request.tag: done.response.tokens
        for done in decoder.slots(2, max(r.room for r in requests)).decode(requests)
    }
    assert [found[i] for i in range(len(prompts))] == expected


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "mistral"])
def test_architectures(architecture):
    backbone = Backbone(build_model(architecture))
    prompts = [[1, 2, 3, 4, 1, 2], [7], [5, 6] * 9]
    expected = [decode_plain(backbone, [prompt], Limits(30))[0].tokens for prompt in prompts]
    decoder = Decoder(backbone, build_heads(backbone, num_heads=3), TREE, limits=Limits(30))
    assert [one.tokens for one in decoder.decode(prompts)] == expected


@FORMS
def test_text_that_repeats_takes_fewer_steps(backbone, cuda_graph):
    """Of a tiny random model, whose greedy answers go in circles: a batch, and slots the same."""
    heads, limits = build_heads(backbone, num_heads=3), Limits(60)
    prompts = [[4, 9, 4], [8]]
    steps = []
    for num_lookup in (0, 8):
        tree = Tree(TREE.parents, TREE.ranks, num_lookup=num_lookup)
        decoder = Decoder(backbone, heads, tree, limits=limits, cuda_graph=cuda_graph)
        answers = decoder.decode(prompts)
        slots = decoder.slots(2, 128).decode([Request(p, limits, tag=p[0]) for p in prompts])
        lengths = {done.request.tag: done.response.accept_lengths for done in slots}
        assert [lengths[p[0]] for p in prompts] == [one.accept_lengths for one in answers]
        steps.append(sum(len(one.accept_lengths) for one in answers))
    assert steps[1] < 0.75 * steps[0]


@FORMS
def test_sampled_continuations_have_the_law_of_plain_sampling(cuda_graph):
    """Chi-square over the first three tokens of 20,000 continuations."""
    backbone = Backbone(build_model("llama", vocab_size=5, spread=1.5))
    heads = build_heads(backbone, num_heads=2)
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    tree = Tree(tree.parents, tree.ranks, num_lookup=3)
    num, rule = 20_000, AcceptanceRule("sampling", seed=3)
    decoder = Decoder(backbone, heads, tree, rule, cuda_graph=cuda_graph)
    prompts, limits = [[1, 2, 3, 1, 2]] * num, Limits(3)
    counts = []
    for said in (decoder.decode(prompts, limits), decode_plain(backbone, prompts, limits, rule)):
        codes = [a * 25 + b * 5 + c for a, b, c in (one.tokens for one in said)]
        counts.append(torch.bincount(torch.tensor(codes), minlength=125).double())
    ours, plain = counts
    seen = ours + plain > 20
    rest = torch.stack([count[~seen].sum() for count in counts])
    ours, plain = torch.cat([ours[seen], rest[:1]]), torch.cat([plain[seen], rest[1:]])
    statistic = ((ours - plain) ** 2 / (ours + plain).clamp(min=1)).sum()
    freedom = int(seen.sum()) - (0 if rest.sum() else 1)
    p_value = 1 - torch.special.gammainc(torch.tensor(freedom / 2), (statistic / 2).float())
    assert p_value > 0.01 and len(ours) > 8


def test_the_tree_names_its_branch(tmp_path):
    TREE.save(tmp_path / "tree.json")
    assert Tree.load(tmp_path / "tree.json") == TREE and TREE.num_checked == len(TREE) + 5
    with pytest.raises(ValueError, match="num_lookup=-1"):
        Tree((-1,), (-1,), num_lookup=-1)


def test_recurrent_layers_are_refused():
    with pytest.raises(UserError, match=r"tree\.lookup=0"):
        check_chain("model", Tree(chain(2).parents, chain(2).ranks, num_lookup=4))
