import random

import pytest

from medusa_exp.evaluate.metrics import speedup, speedup_interval, summarize


def record(method, category, tokens, steps, seconds, identical=True, batch_size=1):
    return {
        "method": method,
        "batch_size": batch_size,
        "category": category,
        "new_tokens": tokens,
        "steps": steps,
        "seconds": seconds,
        "baseline_seconds": tokens * 0.1,
        "baseline_new_tokens": tokens,
        "identical": identical,
        "accept_lengths": [1] * steps if method == "plain" else None,
    }


RECORDS = [
    record("plain", "a", 10, 10, 1.0),
    record("plain", "b", 30, 30, 3.0),
    record("tree", "a", 10, 5, 1.0) | {"accept_lengths": [1, 3, 1, 1, 4]},
    record("tree", "b", 30, 5, 1.0, identical=False) | {"accept_lengths": [1, 7, 2, 2, 18]},
    record("hf_generate", "a", 10, 10, 2.0),
    record("hf_generate", "b", 30, 30, 4.0),
    record("prompt_lookup", "a", 10, 8, 1.0),
    record("prompt_lookup", "b", 30, 32, 3.0),
]


def test_by_hand():
    metrics = summarize(RECORDS)
    assert metrics["eval/tokens_per_step"] == 4.0
    assert metrics["eval/speedup"] == pytest.approx(2.0)  # 4 s over 2 s, not a mean of ratios
    assert metrics["eval/tokens_per_second"] == 20.0
    assert metrics["eval/baseline_tokens_per_second"] == 10.0
    assert metrics["eval/identical_fraction"] == 0.5
    assert metrics["eval/baseline_vs_hf"] == pytest.approx(1.5)
    assert metrics["eval/prompt_lookup_tokens_per_step"] == 1.0
    assert metrics["eval/prompt_lookup_speedup"] == pytest.approx(1.0)
    assert metrics["eval/category/a/speedup"] == pytest.approx(1.0)
    assert metrics["eval/category/b/tokens_per_step"] == 6.0


def test_accepted_guesses_by_depth():
    metrics = summarize(RECORDS)
    shares = [metrics[f"eval/accepted_depth{depth}"] for depth in range(1, 18)]
    assert shares[:4] == [6 / 8, 4 / 8, 3 / 8, 2 / 8]
    assert 1 + sum(shares) == pytest.approx((9 + 29) / 8)  # tokens of a later step


def test_without_baselines():
    metrics = summarize(RECORDS[:4])
    assert not any("lookup" in name or "hf" in name for name in metrics)


def test_batch_sizes_have_figures_of_their_own():
    more = [record("plain", "a", 10, 10, 0.5, batch_size=4), RECORDS[2] | {"batch_size": 4}]
    more[1] |= {"steps": 2, "seconds": 0.5}
    metrics = summarize(RECORDS + more)
    assert metrics["eval/tree/b1/speedup"] == metrics["eval/speedup"]
    assert metrics["eval/tree/b4/tokens_per_step"] == 5.0
    assert metrics["eval/plain/b4/tokens_per_second"] == 20.0


def test_a_shorter_answer_is_not_a_faster_one():
    short = record("tree", "a", 1, 1, 0.1)
    short["baseline_new_tokens"], short["baseline_seconds"] = 10, 1.0
    assert speedup([short]) == pytest.approx(1.0)


def test_the_interval_holds_the_speedup_and_narrows_with_prompts():
    rng = random.Random(0)
    many = [record("tree", "a", 10, 5, 0.4 + 0.2 * rng.random()) for _ in range(400)]
    low, high = speedup_interval(many)
    assert low < speedup(many) < high and high - low < 0.1
    few_low, few_high = speedup_interval(many[:10])
    assert few_high - few_low > high - low


def test_prompts_of_a_batch_are_drawn_together():
    """They share their batch's seconds: drawn one by one, they would seem to be more than it."""
    rng = random.Random(0)
    alone = [record("tree", "a", 10, 5, 0.4 + 0.2 * rng.random()) for _ in range(40)]
    in_fours = [one | {"batch_size": 4} for one in alone for _ in range(4)]
    assert speedup_interval(in_fours) == pytest.approx(speedup_interval(alone))


def test_sampled_answers_are_not_compared():
    random_ones = [
        record(m, "a", 10, 5, 1.0, identical=None) | {"accept_lengths": [2] * 5}
        for m in ("plain", "tree")
    ]
    assert "eval/identical_fraction" not in summarize(random_ones)


def test_one_batch_alone_has_no_interval():
    records = [r | {"batch_size": 4} for r in RECORDS if r["method"] in ("plain", "tree")]
    assert speedup_interval(records[2:]) is None
    assert "eval/speedup_low" not in summarize(records)
