"""Where the time of decoding goes, on a clock that only named methods move on."""

from types import SimpleNamespace

import pytest

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.loop import Limits, decode_tree
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import Verifier
from medusa_exp.evaluate import step_profile
from medusa_exp.model import build_heads
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, PrefixAttention
from medusa_exp.runs.metric_table import PARTS_OF_TIME
from medusa_exp.tree import chain

PROMPTS = [[3, 1, 4], [1, 5, 9, 2]]
SECONDS = [
    (Backbone, "forward", 40.0),
    (MedusaHeads, "forward", 7.0),
    (PrefixAttention, "forward", 3.0),
    (StepMask, "at", 2.0),
    (Verifier, "__call__", 5.0),
    (GrowingCache, "commit", 1.0),
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


@pytest.mark.parametrize("prefix_attention", [False, True])
def test_each_part_is_given_its_own_time_and_no_other(backbone, calls, prefix_attention):
    heads = build_heads(backbone, num_heads=2, prefix_attention=prefix_attention)
    answers = []

    def method(prompts):
        answers.extend(decode_tree(backbone, heads, chain(2), prompts, Limits(20)))

    shares = step_profile.shares_of_time(backbone, method, PROMPTS)
    steps = calls["Verifier"]
    expected = {
        "prompt": 40.0 * len(PROMPTS),
        "backbone": 40.0 * steps,
        "heads": 7.0 * steps + 3.0 * calls["PrefixAttention"],
        "mask": 2.0 * steps,
        "verification": 5.0 * steps,
        "cache": 1.0 * steps,
        "rest": 0.0,
    }
    total = sum(expected.values())
    assert list(shares) == list(PARTS_OF_TIME)
    assert shares == pytest.approx({part: time / total for part, time in expected.items()})
    assert steps == calls["MedusaHeads"] == sum(len(a.accept_lengths) - 1 for a in answers)
    assert bool(calls["PrefixAttention"]) == prefix_attention
    assert [len(answer.tokens) for answer in answers] == [20, 20]


def test_nothing_is_timed_afterwards(backbone):
    before = Backbone.forward, Verifier.__call__
    with pytest.raises(ZeroDivisionError):
        step_profile.shares_of_time(backbone, lambda prompts: 1 // 0, PROMPTS)
    assert before == (Backbone.forward, Verifier.__call__)
    assert "forward" not in vars(backbone)
