"""Where the time of decoding goes, on a clock that only named methods move on."""

from types import SimpleNamespace

import pytest
import torch

from medusa_exp.decode.cache import FixedCache, GrowingCache
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import Verifier
from medusa_exp.decode.step import UNOBSERVED, CapturedStep
from medusa_exp.evaluate import step_profile
from medusa_exp.model import build_heads
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import PrefixAttention, StackedHeads
from medusa_exp.runs.metric_table import PARTS_OF_TIME
from medusa_exp.tree import chain

PROMPTS = [[3, 1, 4], [1, 5, 9, 2]]
SECONDS = [
    (Backbone, "forward", 40.0),
    (StackedHeads, "forward", 7.0),
    (PrefixAttention, "forward", 3.0),
    (StepMask, "at", 2.0),
    (CapturedStep, "_mask_and_positions", 2.0),
    (Verifier, "__call__", 5.0),
    (GrowingCache, "commit", 1.0),
    (FixedCache, "commit", 1.0),
]


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each method was called; each call moves the clock on."""
    now, counts = [0.0], {owner.__name__: 0 for owner, _, _ in SECONDS}
    monkeypatch.setattr(step_profile, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slowed(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*arguments, **options):
            now[0] += seconds
            counts[owner.__name__] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    for owner, name, seconds in SECONDS:
        slowed(owner, name, seconds)
    return counts


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
@pytest.mark.parametrize("prefix_attention", [False, True])
def test_each_part_is_given_its_own_time_and_no_other(
    backbone, calls, prefix_attention, has_fixed_shapes
):
    heads = build_heads(backbone, num_heads=2, prefix_attention=prefix_attention)
    decoder = Decoder(backbone, heads, chain(2), limits=Limits(20), cuda_graph=has_fixed_shapes)
    calls.update(dict.fromkeys(calls, 0))  # of the check of the architecture
    responses = [decoder.decode([prompt])[0] for prompt in PROMPTS]
    num_steps = sum(len(response.accept_lengths) - 1 for response in responses)
    called = dict(calls)
    plain_responses = [decoder.decode_plain([prompt])[0] for prompt in PROMPTS]
    num_plain = sum(len(response.accept_lengths) - 1 for response in plain_responses)
    called_by_both = dict(calls)
    calls.update(dict.fromkeys(calls, 0))

    tree, plain = step_profile.profile(decoder, PROMPTS)

    rounds = 2 if has_fixed_shapes else 1  # with fixed shapes the first is for captures
    assert calls == {name: rounds * count for name, count in called_by_both.items()}
    assert calls["StackedHeads"] == rounds * num_steps
    assert called["Verifier"] == num_steps
    shares = tree.shares()
    expected = {
        "prompt": 40.0 * len(PROMPTS),
        "backbone": 40.0 * num_steps,
        "heads": 7.0 * num_steps + 3.0 * called["PrefixAttention"],
        "mask": 2.0 * num_steps,
        "verification": 5.0 * num_steps,
        "cache": 1.0 * num_steps,
        "rest": 0.0,
    }
    total = sum(expected.values())
    assert list(shares) == list(PARTS_OF_TIME)
    assert shares == pytest.approx({part: time / total for part, time in expected.items()})
    assert bool(called["PrefixAttention"]) == prefix_attention
    assert [len(response.tokens) for response in responses] == [20, 20]
    assert (tree.prompts, tree.tokens, tree.steps) == (2, 40, num_steps + 2)
    assert (plain.prompts, plain.tokens, plain.steps) == (2, 40, 40)
    of_a_step = {"backbone": 40.0, "mask": 2.0, "verification": 5.0, "cache": 1.0}
    of_a_step["heads"] = 10.0 if prefix_attention else 7.0
    assert tree.of_a_step() == pytest.approx({"prompt": 0.0, "rest": 0.0, **of_a_step})
    of_plain = {"backbone": 40.0, "heads": 0.0, "mask": 2.0, "cache": 1.0}
    verified = 5.0 * (called_by_both["Verifier"] - called["Verifier"]) / num_plain
    expected_plain = {"prompt": 0.0, "rest": 0.0, "verification": verified, **of_plain}
    assert plain.of_a_step() == pytest.approx(expected_plain)


def test_a_captured_step_is_timed_by_the_events_captured_with_it(monkeypatch):
    """On a device that needs 2 seconds for the mask, 30 for the backbone and 4 for its prefix.

    Captures take no time on a device; this one takes it at once, so that events can be told apart.
    """
    clock, is_capturing = {"host": 0.0, "device": 0.0}, True

    class Event:
        def __init__(self, **_):
            self.at = None

        def record(self):
            self.at = clock["device"]

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(step_profile, "time", SimpleNamespace(perf_counter=lambda: clock["host"]))
    monkeypatch.setattr(step_profile, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = step_profile.Stopwatch(torch.device("cuda"))
    with watch.part("cache"):  # of a capture that fails: its events never come
        clock["device"] += 7.0
    is_capturing = False
    with watch.part("backbone"):
        pass
    is_capturing = True
    with watch.part("mask"):
        clock["device"] += 2.0
    clock["device"] += 1.0  # of no part
    with watch.part("backbone"):
        clock["device"] += 30.0
        with watch.part("heads"):
            clock["device"] += 4.0
    is_capturing = False
    watch.captured("a graph")
    clock["host"] += 500.0  # what a capture takes
    watch.restart()
    with watch.part("rest"):
        with watch.part("prompt"):
            clock["host"] += 10.0
        for _ in range(2):
            clock["host"] += 40.0
            watch.replayed("a graph")
    assert dict(watch.seconds) == {
        "prompt": 10.0,
        "mask": 4.0,
        "backbone": 60.0,
        "heads": 8.0,
        "rest": 2 * (40.0 - 36.0),
    }


def test_where_events_cannot_be_captured_steps_run_op_by_op(backbone, monkeypatch, caplog):
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), chain(2), limits=Limits(8))
    tried = []

    def shares(decoder, prompts, seconds, uses_fixed_shapes):
        tried.append(uses_fixed_shapes)
        if uses_fixed_shapes:
            raise RuntimeError("no events here")
        return {"rest": 1.0}

    monkeypatch.setattr(step_profile, "_profile", shares)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    decoder.uses_fixed_shapes = True
    assert step_profile.profile(decoder, PROMPTS) == {"rest": 1.0}
    assert tried == [True, False]
    assert "timed op by op, not captured (no events here)" in caplog.text


def test_the_decoder_itself_is_not_observed(backbone):
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), chain(2), limits=Limits(8))
    step_profile.profile(decoder, PROMPTS)
    assert decoder.observer is UNOBSERVED


def test_no_prompt_is_begun_when_time_is_over(backbone, calls):
    decoder = Decoder(backbone, build_heads(backbone, num_heads=2), chain(2), limits=Limits(8))
    tree, plain = step_profile.profile(decoder, PROMPTS, seconds=1.0)
    assert (tree.prompts, plain.prompts) == (1, 1)
