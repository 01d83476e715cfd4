"""Steps of fixed shapes, as a CUDA graph holds them, give what plain decoding gives."""

import random
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

from medusa_exp.decode.loop import Limits, decode_plain, decode_tree
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])


def prompts_of(rng: random.Random, count: int, longest: int = 30) -> list[list[int]]:
    return [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equal_to_plain_decoding(architecture):
    backbone = Backbone(build_model(architecture))
    heads = build_heads(backbone, num_heads=3)
    picked = Tree(TREE.parents, TREE.ranks, num_picked=5)
    rng = random.Random(architecture)
    saved = 0
    for number, tree in enumerate((TREE, picked, chain(2), chain(0), TREE, TREE)):
        prompts = prompts_of(rng, 1 + number % 3)
        limits = Limits(rng.randint(1, 40), {number, number + 9})
        backbone.decodes_statically = False
        plain = decode_plain(backbone, prompts, limits)
        backbone.decodes_statically = True
        static_plain = decode_plain(backbone, prompts, limits)
        ours = decode_tree(backbone, heads, tree, prompts, limits)
        for expected, alone, answer in zip(plain, static_plain, ours, strict=True):
            assert answer.tokens == alone.tokens == expected.tokens
            assert alone.accept_lengths == expected.accept_lengths
            saved += len(expected.accept_lengths) - len(answer.accept_lengths)
    assert saved > 0


def test_a_step_is_kept_and_forgets_the_prompts_before(backbone):
    heads = build_heads(backbone, num_heads=3)
    backbone.decodes_statically = True
    rng = random.Random(0)
    first, second = prompts_of(rng, 2), prompts_of(rng, 2)
    alone = [a.tokens for a in decode_tree(backbone, heads, TREE, second, Limits(20))]
    decode_tree(backbone, heads, TREE, first, Limits(60))
    again = [a.tokens for a in decode_tree(backbone, heads, TREE, second, Limits(20))]
    assert again == alone
    [shape] = backbone.static_steps._caches
    assert shape == (2, 256)
    assert len(backbone.static_steps._steps) == 1


def test_old_caches_make_room(backbone):
    backbone.decodes_statically = True
    for count in range(1, 8):
        decode_plain(backbone, prompts_of(random.Random(count), count), Limits(3))
    assert len(backbone.static_steps._caches) == len(backbone.static_steps._steps) == 4


def test_the_cache_may_be_full(backbone):
    """The model has 128 positions: prompt and answer take them all."""
    heads = build_heads(backbone, num_heads=3)
    prompts = [prompts_of(random.Random(1), 1, 60)[0], [5] * 68]
    expected = [a.tokens for a in decode_plain(backbone, prompts, Limits(60))]
    backbone.decodes_statically = True
    ours = decode_tree(backbone, heads, TREE, prompts, Limits(60))
    assert [a.tokens for a in ours] == expected


def test_draws_depend_on_the_seed_alone(backbone):
    heads = build_heads(backbone, num_heads=3)
    backbone.decodes_statically = True

    def draw(seed: int) -> list[int]:
        rule = AcceptanceRule("sampling", temperature=2.0, seed=seed)
        return decode_tree(backbone, heads, TREE, [[3, 4]], Limits(30), rule)[0].tokens

    assert draw(1) == draw(1) != draw(2)


@pytest.fixture
def fake_cuda(monkeypatch):
    """What a capture asks of torch.cuda, doing nothing; a list with the debug mode last set."""
    nothing = SimpleNamespace(wait_stream=lambda other: None, register_generator_state=id)
    modes = ["default"]

    def set_mode(mode):
        modes.append(mode)
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    fakes = {
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: nothing,
        "graph": lambda graph, pool: nullcontext(),
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": set_mode,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return modes


def test_warming_up_before_a_capture_leaves_no_trace(monkeypatch, backbone, fake_cuda):
    """Else the first answer of a seed is not its second, which needs no capture."""
    heads = build_heads(backbone, num_heads=3)
    backbone.decodes_statically = True
    rule = AcceptanceRule("sampling", temperature=2.0, seed=1)
    expected = decode_tree(backbone, heads, TREE, [[3, 4]], Limits(30), rule)[0].tokens
    [step] = backbone.static_steps._steps.values()
    begin = step.begin

    def begin_with_capture(*given):
        begin(*given)
        step._capture()

    monkeypatch.setattr(step, "begin", begin_with_capture)
    again = decode_tree(backbone, heads, TREE, [[3, 4]], Limits(30), rule)[0].tokens
    assert again == expected


def test_a_model_that_waits_for_the_host_runs_uncaptured(backbone, fake_cuda, caplog):
    heads = build_heads(backbone, num_heads=3)
    [expected] = decode_tree(backbone, heads, TREE, [[3, 4]], Limits(30))
    backbone.decodes_statically = True
    decode_tree(backbone, heads, TREE, [[3, 4]], Limits(2))
    [step] = backbone.static_steps._steps.values()
    run, step._is_capturable = step._run, True

    def run_waiting():
        if fake_cuda[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        run()

    step._run = run_waiting
    [answer] = decode_tree(backbone, heads, TREE, [[3, 4]], Limits(30))
    assert answer.tokens == expected.tokens
    assert fake_cuda[-1] == "default"
    [warning] = caplog.messages
    assert "decode.cuda_graph=false" in warning


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", [AcceptanceRule(), AcceptanceRule("sampling", seed=1)])
def test_captured_steps_say_the_same_as_uncaptured_ones(rule):
    backbone = Backbone(build_model("llama").cuda())
    heads = build_heads(backbone, num_heads=3)
    prompts = prompts_of(random.Random(0), 3)
    growing = decode_tree(backbone, heads, TREE, prompts, Limits(40, {7}), rule)
    backbone.decodes_statically = True
    first = None
    for _ in range(2):  # captured, and replayed for other prompts' sake
        captured = decode_tree(backbone, heads, TREE, prompts, Limits(40, {7}), rule)
        first = first or [a.tokens for a in captured]
        assert [a.tokens for a in captured] == first
        if rule.name == "greedy":
            assert [a.tokens for a in captured] == [a.tokens for a in growing]
        assert all(len(a.tokens) <= 40 for a in captured)


def test_a_tree_without_room_in_a_captured_step_is_refused(backbone):
    heads = build_heads(backbone, num_heads=2)
    backbone.decodes_statically = True
    wide = Tree.from_paths(
        [(i,) for i in range(19)] + [(i, j) for i in range(19) for j in range(13)]
    )
    with pytest.raises(UserError, match=r"267 nodes, and a captured step has room for 256"):
        decode_tree(backbone, heads, wide, [[1, 2]], Limits(4))
