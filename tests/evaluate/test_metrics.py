import pytest

from medusa_exp.evaluate.metrics import summarise


def record(method, category, tokens, steps, seconds, identical=True):
    return {
        "method": method,
        "category": category,
        "new_tokens": tokens,
        "steps": steps,
        "seconds": seconds,
        "baseline_seconds": tokens * 0.1,
        "baseline_new_tokens": tokens,
        "identical": identical,
    }


RECORDS = [
    record("plain", "a", 10, 10, 1.0),
    record("plain", "b", 30, 30, 3.0),
    record("tree", "a", 10, 5, 1.0),
    record("tree", "b", 30, 5, 1.0, identical=False),
    record("hf_generate", "a", 10, 10, 2.0),
    record("hf_generate", "b", 30, 30, 4.0),
    record("prompt_lookup", "a", 10, 8, 1.0),
    record("prompt_lookup", "b", 30, 32, 3.0),
]


def test_by_hand():
    metrics = summarise(RECORDS)
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


def test_without_baselines():
    metrics = summarise(RECORDS[:4])
    assert not any("lookup" in name or "hf" in name for name in metrics)
