import numpy as np
import pytest

from medusa_exp.data.batches import LengthGroupedSampler, collate, padded_length
from medusa_exp.data.sources import Example

LENGTHS = np.random.default_rng(0).integers(5, 200, size=500)


def sampler(num_batches=10_000, start=0, seed=0):
    return LengthGroupedSampler(LENGTHS, 1000, seed, num_batches, start)


def test_one_pass_takes_every_sequence_once_within_the_budget():
    once = sampler()
    batches = list(sampler(once.batches_per_epoch()))
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    padded = [len(batch) * padded_length(LENGTHS[batch].max()) for batch in batches]
    assert max(padded) <= 1000
    assert sum(padded) < 1.4 * LENGTHS.sum()


def test_order_hangs_on_the_seed_alone_and_changes_from_pass_to_pass():
    count = sampler().batches_per_epoch()
    assert list(sampler(20)) == list(sampler(20)) != list(sampler(20, seed=1))
    two = list(sampler(2 * count))
    assert two[:count] != two[count : 2 * count]


@pytest.mark.parametrize("start", [0, 1, 37, 99, 100])
def test_starting_late_gives_the_rest(start):
    assert list(sampler(100, start)) == list(sampler(100))[start:]


def test_a_sequence_longer_than_the_budget_stands_alone():
    assert [len(batch) for batch in LengthGroupedSampler([9, 9], 5, 0, 2)] == [1, 1]


def test_padding_is_not_trained():
    batch = collate(
        [
            Example(np.array([5, 6], dtype=np.int32), np.array([False, True])),
            Example(np.array([7, 8, 9], dtype=np.int32), np.array([True, True, False])),
        ]
    )
    assert batch.input_ids_BT.shape == batch.is_trained_BT.shape == (2, 64)
    assert batch.input_ids_BT[:, :3].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.is_trained_BT[:, :3].tolist() == [[False, True, False], [True, True, False]]
    assert not batch.input_ids_BT[:, 3:].any() and not batch.is_trained_BT[:, 3:].any()
