"""Steps of fixed shapes, as a CUDA graph holds them, give what plain decoding gives."""

import random
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

from medusa_exp.decode.capture import GraphPool, capture
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits, Responses
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.decode.step import CapturedStep
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree, chain

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])


def prompts_of(rng: random.Random, count: int, longest: int = 30) -> list[list[int]]:
    return [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


def captured(backbone: Backbone, rule: AcceptanceRule = GREEDY) -> Decoder:
    """Steps of fixed shapes: captured on a GPU, and the same code without a graph elsewhere."""
    return Decoder(backbone, build_heads(backbone, num_heads=3), TREE, rule, cuda_graph=True)


def steps_of(decoder: Decoder) -> list[CapturedStep]:
    return [
        step
        for kept in decoder._captured.values()
        for c in kept._caches
        for step in c.steps.values()
    ]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equal_to_plain_decoding(architecture):
    backbone = Backbone(build_model(architecture))
    decoder = captured(backbone)
    picked = Tree(TREE.parents, TREE.ranks, num_picked=5)
    rng = random.Random(architecture)
    saved = 0
    for number, tree in enumerate((TREE, picked, chain(2), chain(0), TREE, TREE)):
        prompts = prompts_of(rng, 1 + number % 3)
        limits = Limits(rng.randint(1, 40), {number, number + 9})
        plain = decode_plain(backbone, prompts, limits)
        captured_plain = decoder.decode_plain(prompts, limits)
        ours = decoder.decode(prompts, limits, tree=tree)
        for expected, alone, answer in zip(plain, captured_plain, ours, strict=True):
            assert answer.tokens == alone.tokens == expected.tokens
            assert alone.accept_lengths == expected.accept_lengths
            saved += len(expected.accept_lengths) - len(answer.accept_lengths)
    assert saved > 0


def test_a_step_is_kept_and_forgets_the_prompts_before(backbone):
    decoder = captured(backbone)
    rng = random.Random(0)
    first, second = prompts_of(rng, 2), prompts_of(rng, 2)
    alone = [a.tokens for a in decoder.decode(second, Limits(20))]
    decoder.decode(first, Limits(60))
    again = [a.tokens for a in decoder.decode(second, Limits(20))]
    assert again == alone
    [kept] = decoder._captured.values()
    [cache] = kept._caches
    assert (cache.shape, cache.columns, len(cache.steps)) == ((2, torch.float32), 256, 1)


def test_old_caches_make_room(backbone):
    decoder = captured(backbone)
    for count in range(1, 8):
        decoder.decode_plain(prompts_of(random.Random(count), count), Limits(3))
    [kept] = decoder._captured.values()
    assert len(kept._caches) == len(steps_of(decoder)) == 4


@pytest.mark.parametrize("prefixed", [False, True])
def test_answers_side_by_side_leave_each_other_alone(backbone, prefixed):
    heads = build_heads(backbone, num_heads=3, prefix_attention=prefixed)
    decoder = Decoder(backbone, heads, TREE, cuda_graph=True)
    prompts = prompts_of(random.Random(3), 6)
    alone = [decode_plain(backbone, [prompt], Limits(30))[0].tokens for prompt in prompts]
    beside = [Responses(1, Limits(30)) for _ in prompts]
    waiting = [
        (decoder.steps if number % 2 else decoder.plain_steps)([prompt], responses)
        for number, (prompt, responses) in enumerate(zip(prompts, beside, strict=True))
    ]
    for given_up in (decoder.steps, decoder.plain_steps):
        next(given_up([prompts[0]], Responses(1, Limits(30))))
    while waiting:
        waiting = [steps for steps in waiting if next(steps, None) is not None]
    assert [responses.rows[0].tokens for responses in beside] == alone
    assert not any(cache.is_lent for kept in decoder._captured.values() for cache in kept._caches)
    decoder.decode([prompts[0]] * 2, Limits(3))
    assert all(len(kept._caches) <= 4 for kept in decoder._captured.values())


def test_the_cache_may_be_full(backbone):
    """The model has 128 positions: prompt and answer take them all."""
    prompts = [prompts_of(random.Random(1), 1, 60)[0], [5] * 68]
    expected = [a.tokens for a in decode_plain(backbone, prompts, Limits(60))]
    ours = captured(backbone).decode(prompts, Limits(60))
    assert [a.tokens for a in ours] == expected


def test_draws_depend_on_the_seed_alone(backbone):
    decoder = captured(backbone)

    def draw(seed: int) -> list[int]:
        rule = AcceptanceRule("sampling", temperature=2.0, seed=seed)
        return decoder.decode([[3, 4]], Limits(30), rule=rule)[0].tokens

    assert draw(1) == draw(1) != draw(2)


@pytest.fixture
def fake_cuda(monkeypatch):
    """What a capture asks of torch.cuda, doing nothing; a list with the debug mode last set."""
    nothing = SimpleNamespace(wait_stream=lambda other: None)

    class Graph:
        register_generator_state = pool = id

    modes = ["default"]

    def set_mode(mode):
        modes.append(mode)
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    fakes = {
        "Stream": lambda device: nothing,
        "device": lambda device: nullcontext(),
        "current_stream": lambda: nothing,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph, **options: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": set_mode,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return modes


def test_warming_up_before_a_capture_leaves_no_trace(monkeypatch, backbone, fake_cuda):
    """Else the first answer of a seed is not its second, which needs no capture."""
    decoder = captured(backbone, AcceptanceRule("sampling", temperature=2.0, seed=1))
    expected = decoder.decode([[3, 4]], Limits(30))[0].tokens
    [step] = steps_of(decoder)
    begin = step.begin

    def begin_with_capture(*given):
        begin(*given)
        step._capture()

    monkeypatch.setattr(step, "begin", begin_with_capture)
    again = decoder.decode([[3, 4]], Limits(30))[0].tokens
    assert again == expected


@pytest.mark.parametrize("rule", ["greedy", "sampling"])
def test_captures_between_the_steps_of_slots_leave_no_trace(monkeypatch, backbone, fake_cuda, rule):
    """A step is captured when it is first taken, with other prompts in its rows already."""
    requests = [
        Request(prompt, Limits(4 + 5 * number), seed=(1, number), tag=number)
        for number, prompt in enumerate(prompts_of(random.Random(6), 7))
    ]

    def tokens():
        decoder = captured(backbone, AcceptanceRule(rule, temperature=2.0, seed=1))
        slots = decoder.slots(4, 128)
        return {done.request.tag: done.response.tokens for done in slots.decode(requests)}

    expected, captures = tokens(), []
    prepare, capture = CapturedStep.prepare, CapturedStep._capture

    def prepares(step):
        if step not in captures:
            captures.append(step)
            capture(step)
        prepare(step)

    monkeypatch.setattr(CapturedStep, "prepare", prepares)
    assert tokens() == expected
    assert len(captures) > 1


def test_a_model_that_waits_for_the_host_runs_uncaptured(backbone, fake_cuda, caplog):
    [expected] = decode_plain(backbone, [[3, 4]], Limits(30))
    decoder = captured(backbone)
    decoder.decode([[3, 4]], Limits(2))
    [step] = steps_of(decoder)
    run, step._is_capturable = step._run, True

    def run_waiting():
        if fake_cuda[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (a test)", stacklevel=1)
        run()

    step._run = run_waiting
    [answer] = decoder.decode([[3, 4]], Limits(30))
    assert answer.tokens == expected.tokens
    assert fake_cuda[-1] == "default"
    [warning] = caplog.messages
    assert "decode.cuda_graph=false" in warning


def test_another_thread_may_wait_for_the_device_meanwhile(fake_cuda):
    """torch's debug mode holds for all threads: a server sends the next prompt in another."""

    def wait():
        if fake_cuda[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (a test)", stacklevel=1)

    def beside():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()

    pool = GraphPool(torch.device("cuda"))
    assert capture(beside, pool, lambda graph: None) is not None
    assert capture(wait, pool, lambda graph: None) is None and fake_cuda[-1] == "default"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", [AcceptanceRule(), AcceptanceRule("sampling", seed=1)])
def test_captured_steps_say_the_same_as_uncaptured_ones(rule):
    backbone = Backbone(build_model("llama").cuda())
    decoder = captured(backbone, rule)
    prompts = prompts_of(random.Random(0), 3)
    eager = Decoder(backbone, decoder.heads, TREE, rule, cuda_graph=False)
    growing = eager.decode(prompts, Limits(40, {7}))
    first = None
    for _ in range(2):  # captured, and replayed for other prompts' sake
        found = decoder.decode(prompts, Limits(40, {7}))
        first = first or [a.tokens for a in found]
        assert [a.tokens for a in found] == first
        if rule.name == "greedy":
            assert [a.tokens for a in found] == [a.tokens for a in growing]
        assert all(len(a.tokens) <= 40 for a in found)


def test_a_tree_without_room_in_a_captured_step_is_refused(backbone):
    wide = Tree.from_paths(
        [(i,) for i in range(19)] + [(i, j) for i in range(19) for j in range(13)]
    )
    with pytest.raises(UserError, match=r"267 nodes, and a captured step has room for 256"):
        captured(backbone).decode([[1, 2]], Limits(4), tree=wide)
