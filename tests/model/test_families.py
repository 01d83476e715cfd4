"""What all families of heads have in common, and what each is for."""

import pytest
import torch
from tiny_models import build_model

from medusa_exp.config.limits import words_of
from medusa_exp.config.schema import HeadConfig
from medusa_exp.data.batching import label_positions
from medusa_exp.decode import generate
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import SequentialDrafter
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.model import Backbone, build_heads, int8, load_heads, save_heads
from medusa_exp.model.heads import FAMILIES as KINDS
from medusa_exp.model.heads import (
    StackedHeads,
    advice_on_cost,
    family_for,
    heads_input,
    layers,
    own_projections_for,
    stack_heads,
)
from medusa_exp.model.int8 import to_int8
from medusa_exp.model.loss import (
    medusa_counts,
    medusa_losses,
)
from medusa_exp.model.row_loss import AcceptanceLoss, Divergence
from medusa_exp.model.scoring import answer_ranks
from medusa_exp.model.targets import (
    TeacherTargets,
    TokenTargets,
    TopTargets,
)
from medusa_exp.model.teacher_forcing import teacher_forced
from medusa_exp.tree import Tree, chain
from medusa_exp.tree.search import num_steps

COUNTS = torch.arange(64).flip(0)
FAMILIES = {
    "medusa": {"kind": "medusa"},
    "no bias": {"kind": "medusa", "bias": False, "num_layers": 2},
    "tied": {"kind": "medusa_tied", "num_layers": 2},
    "tied, frequent": {"kind": "medusa_tied", "num_tokens": 40, "token_counts": COUNTS},
    "rank": {"kind": "medusa_lowrank", "rank": 16},
    "frequent": {"kind": "medusa_lowrank", "num_tokens": 40, "token_counts": COUNTS},
    "both": {"kind": "medusa_lowrank", "rank": 16, "num_tokens": 40, "token_counts": COUNTS},
    "hydra": {"kind": "hydra", "num_layers": 2},
    "rooted": {"kind": "rooted"},
    "rooted, both": {"kind": "rooted", "rank": 16, "num_tokens": 40, "token_counts": COUNTS},
    "rooted, prefix": {"kind": "rooted", "num_layers": 0, "prefix_attention": True},
    "recurrent": {"kind": "recurrent", "num_layers": 2},
    "recurrent, both": {
        **{"kind": "recurrent", "rank": 16, "num_tokens": 40},
        "token_counts": COUNTS,
    },
    "recurrent, shared": {"kind": "recurrent", "own_projections": False},
    "recurrent, prefix": {"kind": "recurrent", "prefix_attention": True},
    "medusa, prefix": {"kind": "medusa", "prefix_attention": True},
    "hydra, prefix": {"kind": "hydra", "prefix_attention": True},
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def moved(backbone, family, num_heads=3):
    """Heads that have left their start."""
    torch.manual_seed(0)
    heads = build_heads(backbone, num_heads=num_heads, **family)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return heads


def batch_of(backbone):
    torch.manual_seed(1)
    ids_BT = torch.randint(0, 64, (3, 20))
    hidden_BTD = backbone.hidden_states(ids_BT).detach()
    labeled = label_positions(torch.rand(3, 20) < 0.6, torch.ones_like(ids_BT), 3)
    return hidden_BTD, labeled, ids_BT


def test_every_kind_is_tested():
    assert {family["kind"] for family in FAMILIES.values()} == set(KINDS)
    assert set(words_of(HeadConfig, "kind")) == {*KINDS, "auto"}


@pytest.mark.parametrize("architecture", ["llama", "phi"])  # phi's lm_head has a bias
def test_fresh_heads_say_what_the_lm_head_says(family, architecture):
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=2, **family)
    hidden_RD = torch.randn(50, 32)
    drafted_R2 = torch.randint(0, 64, (50, 2))
    expected_RW = heads.from_head_vocab(backbone.lm_head(hidden_RD))
    for k in range(2):
        logits_RW = heads.head_logits(k, hidden_RD, drafted_R2).detach()
        if family.get("rank"):  # half the rank keeps more than half of what there is
            error = (logits_RW - expected_RW).square().sum() / expected_RW.square().sum()
            assert 0 < error < 0.5
        else:
            torch.testing.assert_close(logits_RW, expected_RW)


def test_files_give_the_same_heads(backbone, tmp_path, family):
    heads = moved(backbone, family)
    save_heads(heads, tmp_path / "heads")
    loaded = load_heads(tmp_path / "heads", backbone)
    assert loaded.config.kind == family["kind"] and loaded.num_heads == 3
    hidden_RD, drafted_R3 = torch.randn(4, 32), torch.randint(0, 64, (4, 3))
    for k in range(3):
        theirs = heads.head_logits(k, hidden_RD, drafted_R3)
        assert torch.equal(loaded.head_logits(k, hidden_RD, drafted_R3), theirs)


def test_a_decoded_answer_is_the_backbones(backbone, family):
    heads = moved(backbone, family)
    tree = Tree.from_paths([(0,), (1,), (4,), (0, 0), (0, 2), (1, 0), (0, 0, 0), (0, 0, 1)])
    prompts = [[5, 9, 3], [1], [7, 7, 2, 60, 11]]
    limits = Limits(24)
    plain = decode_plain(backbone, prompts, limits)
    answers = Decoder(backbone, heads, tree).decode(prompts, limits)
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    fixed = Decoder(backbone, heads, tree, cuda_graph=True).decode(prompts, limits)
    assert [a.accept_lengths for a in fixed] == [a.accept_lengths for a in answers]
    assert [a.tokens for a in fixed] == [a.tokens for a in plain]
    ids_1T = torch.tensor([prompts[0]])
    generated = generate(backbone, heads, ids_1T, tree=tree, max_new_tokens=24)
    assert generated.sequences == [plain[0].tokens]


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_replay_counts_the_steps_that_decoding_takes(backbone, family, shape):
    heads = moved(backbone, family)
    paths = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (0, 0, 2)]
    tree = chain(3) if shape == "chain" else Tree.from_paths(paths)
    prompt = [5, 9, 3]
    [plain] = decode_plain(backbone, [prompt], Limits(60))
    [answer] = Decoder(backbone, heads, tree).decode([prompt], Limits(60))
    ids = torch.tensor([prompt + plain.tokens])
    read_1TD = heads_input(heads.prefix, backbone.hidden_states(ids))
    hidden_PD = read_1TD[0, len(prompt) - 1 : -1]
    ranks = answer_ranks(heads, torch.tensor(plain.tokens), hidden_PD, 10)
    assert num_steps([ranks], tree) == len(answer.accept_lengths)


def test_stacked_heads_are_the_same_heads(backbone, family):
    heads = moved(backbone, family)
    if heads.is_sequential:
        assert stack_heads(heads, backbone) is heads
        return
    hidden_BD, root_B = torch.randn(5, 32), torch.randint(64, (5,))
    for count in (None, 2):
        stacked_BKV = StackedHeads(heads, torch.float32)(hidden_BD, count, root_B)
        assert stacked_BKV.shape == (5, count or 3, 64)
        torch.testing.assert_close(stacked_BKV, heads(hidden_BD, count, root_B).detach())


@pytest.mark.parametrize("is_faster", [True, False])
def test_large_layers_in_a_half_type_are_called_one_by_one_where_that_is_faster(
    backbone, family, is_faster, monkeypatch
):
    heads = moved(backbone, family)
    if heads.is_sequential:
        assert stack_heads(heads, backbone) is heads  # whose layers are called one by one anyway
        return
    monkeypatch.setattr(layers, "_LARGE", 0)
    monkeypatch.setattr(layers, "is_faster_unbatched", lambda layers: is_faster)
    linear_layers = [
        *(block.linear for blocks in heads.blocks for block in blocks),
        *heads.lm_heads.output_layers(),
    ]

    def shared(stacked: StackedHeads) -> list[bool]:
        return [any(one is module for module in stacked.modules()) for one in linear_layers]

    for dtype in (torch.float32, torch.float64, torch.bfloat16):  # of another type: batched
        assert not any(shared(StackedHeads(heads, dtype)))
    heads.to(torch.bfloat16)
    stacked = StackedHeads(heads, torch.bfloat16)
    assert set(shared(stacked)) == {is_faster}  # in which packing finds them
    hidden_BD, root_B = torch.randn(5, 32).bfloat16(), torch.randint(64, (5,))
    for count in (None, 2):
        said = stacked(hidden_BD, count, root_B)
        expected = heads(hidden_BD, count, root_B).detach()
        torch.testing.assert_close(said, expected, rtol=0.05, atol=0.05)
    if is_faster:
        with pytest.raises(ValueError, match=r"zip\(\)"):
            stacked(hidden_BD, 4, root_B)
        monkeypatch.setattr(layers, "_LARGE", 1 << 20)
        assert not any(shared(StackedHeads(heads, torch.bfloat16)))


def test_logits_of_the_head_vocabulary_are_those_of_all_tokens(backbone, family):
    heads = moved(backbone, family).requires_grad_(False)
    if heads.is_sequential:
        return
    hidden_BD, root_B = torch.randn(5, 32), torch.randint(64, (5,))
    for some in (heads, stack_heads(heads, backbone)):
        all_BKV = some(hidden_BD, 2, root_B)
        few_BKW = some(hidden_BD, 2, root_B, in_head_vocab=True)
        assert few_BKW.shape[-1] == heads.config.head_vocab_size
        assert torch.equal(heads.over_vocabulary(few_BKW), all_BKV)


@pytest.mark.skipif(not int8.is_supported(), reason="no fast products of integers")
def test_drafts_in_8_bit_integers_are_near_and_change_no_answer(backbone, family, monkeypatch):
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)
    heads = moved(backbone, family).requires_grad_(False)
    hidden_RD, drafted_RJ = torch.randn(5, 32), torch.arange(15).view(5, 3)
    wanted = [heads.head_logits(k, hidden_RD, drafted_RJ) for k in range(3)]
    is_large = family["kind"] != "medusa_tied" and not family.get("rank")  # 32 inputs, or 16
    assert to_int8(heads.lm_heads.output_layers()) is is_large
    for k, wanted_RW in enumerate(wanted):
        found_RW = heads.head_logits(k, hidden_RD, drafted_RJ)
        error = (found_RW - wanted_RW).norm() / wanted_RW.norm()
        assert (0 < error < 0.02) if is_large else error == 0
    ready = stack_heads(heads, backbone)
    if not heads.is_sequential and heads.root_block is None:
        stacked_RKW = ready(hidden_RD, None, drafted_RJ[:, 0], in_head_vocab=True)
        torch.testing.assert_close(stacked_RKW[:, 2], found_RW)
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 0, 0], [0, 1]])
    decoder = Decoder(backbone, ready, tree, limits=Limits(12))
    for prompts in ([[1, 2, 3]], [[7, 5]] * 5 + [[1, 2, 3]] * 5):  # few rows, and many
        plain = [answer.tokens for answer in decoder.decode_plain(prompts)]
        assert [answer.tokens for answer in decoder.decode(prompts)] == plain


@pytest.mark.parametrize("form", ["recompute", "at_once"])
@pytest.mark.parametrize("loss", ["ce", "kl", "topk_kl", "lk"])
def test_training_moves_all_parameters_and_nothing_else(backbone, family, loss, form):
    heads = moved(backbone, family)
    hidden_BTD, labeled, ids_BT = batch_of(backbone)

    def next_logits(hidden_RD):
        return heads.from_head_vocab(backbone.next_logits(hidden_RD))

    def of_all(hidden_RD):
        return heads.from_head_vocab(backbone.next_logits(hidden_RD).softmax(-1))

    def of_head_vocab(hidden_RD):
        return next_logits(hidden_RD).softmax(-1)

    targets = {
        "ce": lambda: TokenTargets(heads.to_head_vocab(ids_BT)),
        "kl": lambda: TeacherTargets(hidden_BTD, of_head_vocab, Divergence()),
        "topk_kl": lambda: TopTargets(hidden_BTD, torch.arange(ids_BT.numel()), next_logits, 5),
        "lk": lambda: TeacherTargets(hidden_BTD, of_all, AcceptanceLoss("lk"), labeled[0]),
    }[loss]()
    read_BTD = heads_input(heads.prefix, hidden_BTD)
    losses = medusa_losses(heads, read_BTD, targets, labeled, ids_BT, chunk_rows=8, form=form)
    sum(part.loss_sum for part in losses).backward()
    assert all(part.loss_sum > 0 for part in losses)
    assert all(parameter.grad.any() for parameter in heads.parameters())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_tied_heads_save_only_their_blocks(backbone, tmp_path):
    heads = moved(backbone, FAMILIES["tied"])
    assert sum(p.numel() for p in heads.parameters()) == 3 * 2 * (32 * 32 + 32)
    save_heads(heads, tmp_path / "heads")
    alone = load_heads(tmp_path / "heads")
    with pytest.raises(ValueError, match="share the lm_head of their backbone: load them with it"):
        alone(torch.randn(1, 32))


def test_tied_heads_take_the_backbones_dtype_where_they_share():
    backbone = Backbone(build_model("llama", dtype=torch.bfloat16))
    heads = moved(backbone, FAMILIES["tied"])
    logits_RV = heads.head_logits(0, torch.randn(4, 32))
    assert logits_RV.dtype == torch.bfloat16 and heads.dtype == torch.float32
    logits_RV.float().sum().backward()
    assert heads.blocks[0][0].linear.weight.grad.any()


def test_frequent_tokens_are_known_and_others_never_guessed(backbone):
    heads = moved(backbone, FAMILIES["frequent"])
    assert heads.token_map.tolist() == list(range(40))
    logits_BKV = heads(torch.randn(6, 32))
    assert logits_BKV.shape == (6, 3, 64) and (logits_BKV[..., 40:] == -torch.inf).all()
    assert heads.to_head_vocab(torch.tensor([3, 39, 40, 63])).tolist() == [3, 39, -100, -100]
    hidden_BTD, labeled, ids_BT = batch_of(backbone)
    rare_BT = ids_BT.clamp(min=40)
    targets = TokenTargets(heads.to_head_vocab(rare_BT))
    rest = (labeled, ids_BT)
    assert all(
        part.loss_sum == 0
        for part in medusa_losses(heads, hidden_BTD, targets, *rest, chunk_rows=8)
    )
    counts_K4 = medusa_counts(heads, hidden_BTD, rare_BT, *rest, chunk_rows=8)
    assert not counts_K4[:, :3].any() and (counts_K4[:, 3] > 0).all()


@pytest.mark.parametrize("family", ["hydra", "recurrent"])
def test_sequential_heads_see_the_tokens_before_their_own(backbone, family):
    heads = moved(backbone, FAMILIES[family])
    hidden_RD, drafted_RJ = torch.randn(1, 32), torch.tensor([[4, 5, 6]])
    other_RJ = torch.tensor([[4, 9, 6]])
    first, second = (
        [heads.head_logits(k, hidden_RD, tokens).detach() for k in range(3)]
        for tokens in (drafted_RJ, other_RJ)
    )
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    with pytest.raises(ValueError, match="decode with a tree"):
        heads(hidden_RD)


def test_rooted_heads_see_the_root_alone(backbone):
    heads = moved(backbone, FAMILIES["rooted"])
    hidden_RD = torch.randn(1, 32)
    first, again, other = (
        [heads.head_logits(k, hidden_RD, torch.tensor(seen)).detach() for k in range(3)]
        for seen in ([[4, 5, 6]], [[4, 9, 7]], [[8, 5, 6]])
    )
    for k in range(3):
        assert torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k])
    with pytest.raises(ValueError, match="decode with a tree"):
        heads(hidden_RD)


@pytest.mark.parametrize("own", [False, True, None])
def test_recurrent_heads_share_all_but_what_they_see_and_their_projections(backbone, own):
    one, four = (
        build_heads(backbone, num_heads=n, kind="recurrent", own_projections=own) for n in (1, 4)
    )
    size = 32  # of inner, its bias, out, skip and the lm_head
    shared = 2 * size * 2 * size + 2 * size + 2 * size * size
    assert one.num_parameters() == shared + 64 * size
    assert four.num_parameters() == shared + 64 * size * (1 if own is False else 4)


@pytest.mark.parametrize(
    ("kind", "size", "num_tokens", "asked", "expected"),
    [
        ("recurrent", 16_384, None, None, True),
        ("recurrent", 262_144, 16_384, None, True),
        ("recurrent", 16_385, None, None, False),
        ("recurrent", 262_144, 32_768, None, False),
        ("recurrent", 16_385, None, True, True),
        ("recurrent", 100, None, False, False),
        ("rooted", 100, None, None, None),
    ],
)
def test_recurrent_heads_of_a_large_vocabulary_have_one_projection(
    kind, size, num_tokens, asked, expected
):
    assert own_projections_for(kind, size, num_tokens, asked) is expected


@pytest.mark.parametrize("family", ["hydra", "recurrent", "recurrent, both"])
def test_own_drafts_are_those_that_decoding_makes(backbone, family):
    heads = moved(backbone, FAMILIES[family])
    hidden_BTD, text_BT = torch.randn(1, 10, 32), torch.randint(0, 64, (1, 10))
    labeled, rows = [torch.arange(8 - k) for k in range(4)], torch.arange(5)
    inputs = list(
        teacher_forced(heads, hidden_BTD, text_BT, labeled, chunk_rows=4, sees_own_drafts=True)
    )
    draft = SequentialDrafter(heads, chain(3), backbone.device)(text_BT[0, 1:6], hidden_BTD[0, :5])
    seen_RJ = draft.tokens_BN[:, :3]
    assert not torch.equal(seen_RJ, text_BT[0].unfold(0, 3, 1)[1:6])
    for k, each in enumerate(inputs):
        logits_RW = each.logits_of(*(part[rows] for part in each.rows))
        expected_RW = heads.head_logits(k, hidden_BTD[0, rows], seen_RJ)
        torch.testing.assert_close(logits_RW, expected_RW)


@pytest.mark.parametrize("family", ["recurrent", "recurrent, both"])
def test_recurrent_heads_are_unrolled_once_for_all(backbone, family):
    heads = moved(backbone, FAMILIES[family])
    hidden_BTD, labeled, ids_BT = batch_of(backbone)
    steps = []
    advance, heads.advance = heads.advance, lambda *args: steps.append(1) or advance(*args)
    of_heads = teacher_forced(heads, hidden_BTD, ids_BT, labeled, chunk_rows=8)
    found = [each.logits_of(*each.rows) for each in of_heads]
    assert len(steps) == 3
    for k, logits_RW in enumerate(found):
        index_R = labeled[k + 1]
        seen_RJ = ids_BT.flatten()[index_R[:, None] + torch.arange(1, k + 2)]
        expected_RW = heads.head_logits(k, hidden_BTD.flatten(0, 1)[index_R], seen_RJ)
        torch.testing.assert_close(logits_RW, expected_RW)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "medusa", "rank": 16}, "kind=medusa has no rank"),
        ({"kind": "hydra", "num_tokens": 40}, "kind=hydra has no num_tokens"),
        ({"kind": "medusa_tied", "rank": 16}, "kind=medusa_tied has no rank"),
        ({"kind": "medusa_lowrank"}, "needs rank or num_tokens"),
        ({"kind": "medusa_lowrank", "num_tokens": 20}, "needs token_counts"),
        ({"kind": "medusa_tied", "num_layers": 0}, "needs num_layers"),
        ({"kind": "recurrent", "num_layers": 0}, "needs num_layers"),
    ],
)
def test_shapes_that_make_no_heads(backbone, wrong, message):
    with pytest.raises(ValueError, match=message):
        build_heads(backbone, num_heads=2, **wrong)


def test_the_forms_of_the_loss_have_the_same_gradients(backbone, family):
    heads = moved(backbone, family)
    hidden_BTD, labeled, ids_BT = batch_of(backbone)
    found = []
    for form in ("recompute", "at_once"):
        losses = medusa_losses(
            heads,
            heads_input(heads.prefix, hidden_BTD),
            TokenTargets(heads.to_head_vocab(ids_BT)),
            *(labeled, ids_BT),
            chunk_rows=8,
            form=form,
        )
        loss = sum(0.7**k * part.loss_sum for k, part in enumerate(losses))
        found.append(torch.autograd.grad(loss, list(heads.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kind", "size", "num_tokens", "can_share", "expected"),
    [
        ("auto", 16_384, None, True, ("rooted", None)),
        ("auto", 16_385, None, True, ("recurrent", 16_384)),
        ("auto", 16_385, 4096, True, ("recurrent", 4096)),
        ("auto", 1000, 100, True, ("recurrent", 100)),
        ("auto", 200_000, None, False, ("medusa", None)),
        ("auto", 1000, None, False, ("medusa", None)),
        ("auto", 200_000, 4096, False, ("medusa_lowrank", 4096)),
        ("hydra", 200_000, None, True, ("hydra", None)),
        ("medusa_tied", 200_000, 100, True, ("medusa_tied", 100)),
    ],
)
def test_auto_is_recurrent_above_16384_tokens(kind, size, num_tokens, can_share, expected):
    assert family_for(kind, size, num_tokens, can_share=can_share) == expected


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_separate_projections_to_a_large_vocabulary_are_spoken_of(family):
    backbone = Backbone(build_model("llama"))
    heads = stack_heads(build_heads(backbone, num_heads=2, **family), backbone)
    assert advice_on_cost(heads, 0.314) is None
    heads.config.vocab_size = 128_256
    advice = advice_on_cost(heads, 0.314)
    if family["kind"] in ("medusa", "hydra") or family in (
        {"kind": "rooted"},
        FAMILIES["rooted, prefix"],
        FAMILIES["recurrent"],
        FAMILIES["recurrent, prefix"],
    ):
        assert "31% of a step (eval/time/heads)" in advice and "128,256 tokens" in advice
    else:
        assert advice is None


@pytest.mark.parametrize("family", ["hydra", "recurrent", "recurrent, both"])
def test_sequential_heads_are_copied_into_another_dtype_with_what_they_share(family):
    backbone = Backbone(build_model("llama"))
    heads = moved(backbone, FAMILIES[family])
    copied = heads.copied(torch.bfloat16)
    assert (copied.dtype, heads.dtype) == (torch.bfloat16, torch.float32)
    assert copied._embedding[0] is backbone.model.get_input_embeddings()
    assert backbone.model.dtype == torch.float32
    drafted_RJ = torch.tensor([[1, 2]])
    hidden_RD = torch.randn(1, backbone.hidden_size)
    ours, theirs = (h.head_logits(1, hidden_RD.to(h.dtype), drafted_RJ) for h in (copied, heads))
    assert torch.allclose(ours.float(), theirs, atol=0.05 * theirs.std().item())
