"""What the evaluation does before the clock counts."""

from types import SimpleNamespace

import pytest

from medusa_exp.stages.evaluate import _warm_up


@pytest.mark.parametrize(
    ("num_prompts", "batch_size", "expected"),
    [(2, 1, [1, 1]), (2, 4, [4]), (3, 5, [5]), (2, 64, [10]), (0, 4, [])],
)
def test_every_size_of_batch_that_is_timed_has_been_seen(num_prompts, batch_size, expected):
    prompts = [SimpleNamespace(input_ids=[number]) for number in range(10)]
    seen: list[int] = []
    _warm_up({"tree": lambda batch: seen.append(len(batch))}, prompts, num_prompts, batch_size)
    assert sorted(seen) == expected
