"""From which batch size on plain decoding is faster: found, said, and as a schedule for engines."""

import math

import pytest

from medusa_exp.evaluate.break_even import break_even

CASES = [
    ({1: 2.0, 4: 1.5, 16: 0.5}, 8.0, "From 8 prompts at a time on"),
    ({16: 0.5, 1: 2.0}, 16 ** (2 / 3), "between 1 prompt at a time (2.00x) and 16 prompts"),
    ({1: 2.0, 4: 1.0}, 4.0, "From 4 prompts at a time on"),
    ({1: 2.0, 4: 0.9, 8: 1.2, 16: 0.8}, 8 * 2**0.5, "between 8 prompts at a time (1.20x)"),
    (
        {1: 2.0, 4: 1.2},
        None,
        "largest batch size measured, 4 prompts at a time (1.20x). The size",
    ),
    ({1: 2.0}, None, "evaluate.batch_sizes=[1,4,16,64]"),
    ({4: 0.8, 16: 0.5}, 4.0, "at every batch size measured, from 4 prompts at a time (0.80x)"),
    ({4: 0.8}, 4.0, "Smaller ones were not measured: evaluate.batch_sizes=[1]"),
    ({64: 1.5}, None, "measure a larger one"),
]


@pytest.mark.parametrize(("speedups", "size", "said"), CASES)
def test_the_crossing_lies_between_two_measurements(speedups, size, said):
    found = break_even("tree", speedups)
    assert found.size == (None if size is None else pytest.approx(size, rel=1e-5))
    assert said in found.sentence()


UNCLEAR = [
    (
        {1: 1.03},
        {1: (0.84, 1.48)},
        None,
        "No clear difference from plain decoding at 1 prompt at a time (1.03x, 95 %: 0.84 to "
        "1.48): more",
    ),
    (
        {1: 0.9, 4: 0.97},
        {1: (0.8, 1.1), 4: (0.7, 1.2)},
        None,
        "No clear difference from plain decoding at 1 prompt at a time (0.90x, 95 %: 0.80 to "
        "1.10), and no clearer one up to 4 prompts",
    ),
    (
        {1: 1.5, 4: 1.1},
        {1: (1.2, 1.7), 4: (0.9, 1.3)},
        None,
        "showed no clear difference from plain decoding at the largest batch size measured, "
        "4 prompts at a time (1.10x, 95 %: 0.90 to 1.30). The",
    ),
    (
        {1: 1.5, 4: 0.9},
        {1: (1.2, 1.7), 4: (0.8, 1.1)},
        None,
        "4 prompts at a time (0.90x, 95 %: 0.80 to 1.10). The size from which on plain decoding is "
        "faster is not known: more prompts (evaluate.num_prompts) or a larger one may tell.",
    ),
    ({1: 1.5}, {1: (1.2, 1.7)}, None, "Only 1 prompt at a time (1.50x) was measured"),
    (
        {1: 1.5, 4: 0.9, 16: 0.5},
        {1: (1.2, 1.7), 4: (0.8, 1.1), 16: (0.4, 0.6)},
        4.0,
        "From 4 prompts at a time on, plain decoding is faster than over the tree: between 1 "
        "prompt at a time (1.50x) and 16 prompts at a time (0.50x).",
    ),
    (
        {1: 1.03, 4: 0.8},
        {1: (0.9, 1.2), 4: (0.7, 0.9)},
        4.0,
        "From 4 prompts at a time on, plain decoding is faster than over the tree: it was at 4 "
        "prompts at a time (0.80x); no clear difference at 1 prompt at a time (1.03x, 95 %",
    ),
    (
        {1: 2.0, 4: 0.5, 16: 1.1},
        {4: (0.4, 0.6), 16: (0.9, 1.3)},
        4 ** (2 / 3),
        "and 4 prompts at a time (0.50x); no clear difference at 16 prompts at a time (1.10x, ",
    ),
    (
        {1: 0.8, 4: 1.1},
        {1: (0.7, 0.9), 4: (0.9, 1.3)},
        1.0,
        "from 1 prompt at a time (0.80x), but for 4 prompts at a time (1.10x, 95 %: 0.90 to 1.30): "
        "no clear difference.",
    ),
]


@pytest.mark.parametrize(("speedups", "intervals", "size", "said"), UNCLEAR)
def test_what_chance_may_have_made_is_no_difference(speedups, intervals, size, said):
    found = break_even("tree", speedups, intervals)
    assert said in found.sentence()
    assert found.size == (None if size is None else pytest.approx(size, rel=1e-5))


@pytest.mark.parametrize(("speedups", "intervals", "size", "said"), UNCLEAR)
def test_the_whole_number_follows_the_intervals_and_a_schedule_what_is_likelier(
    speedups, intervals, size, said
):
    found, likely = break_even("tree", speedups, intervals), break_even("tree", speedups)
    assert found.slower_from == (None if size is None else math.ceil(size))
    last = max(speedups)
    if likely.slower_from is None:
        assert found.schedule(3) == [[1, last, 3]]
        return
    drafted = [[1, likely.slower_from - 1, 3]] if likely.slower_from > 1 else []
    assert found.schedule(3) == [*drafted, [likely.slower_from, max(likely.slower_from, last), 0]]


def test_an_engine_does_not_draft_where_plain_decoding_was_faster_by_a_wide_interval():
    intervals = {1: (1.3, 1.7), 8: (0.4, 1.05), 32: (0.3, 1.01)}
    found = break_even("tree", {1: 1.5, 8: 0.7, 32: 0.6}, intervals)
    assert found.size is None and found.schedule(4) == [[1, 3, 4], [4, 32, 0]]


@pytest.mark.parametrize(
    ("speedups", "wanted", "expected"),
    [
        ({1: 2.0, 16: 0.5}, 4, [[1, 6, 4], [7, 16, 0]]),
        ({1: 2.0, 4: 1.0}, 3, [[1, 3, 3], [4, 4, 0]]),
        ({1: 2.0, 4: 1.2}, 3, [[1, 4, 3]]),
        ({1: 0.9, 4: 0.5}, 3, [[1, 4, 0]]),
        ({4: 0.9, 16: 0.5}, 3, [[1, 16, 0]]),
        ({4: 1.5, 16: 1.0}, 3, [[1, 15, 3], [16, 16, 0]]),
        (
            {1: 2.0, 16: 0.5},
            [[1, 3, 4], [4, 15, 2], [16, 16, 0]],
            [[1, 3, 4], [4, 6, 2], [7, 16, 0]],
        ),
        ({1: 2.0, 64: 0.5}, [[1, 3, 4], [4, 4, 2]], [[1, 3, 4], [4, 4, 2], [16, 64, 0]]),
        ({1: 2.0, 4: 1.2}, [[1, 7, 3], [8, 8, 1]], [[1, 7, 3], [8, 8, 1]]),
    ],
)
def test_an_engine_drafts_nothing_from_there_on(speedups, wanted, expected):
    found = break_even("chain", speedups).schedule(wanted)
    assert found == expected
    assert found[0][0] == 1 and all(low <= high for low, high, _ in found)
