import numpy as np
import pytest

from medusa_exp.data.batching import BatchSampler, epoch_planner, padded_length

LENGTHS = np.random.default_rng(0).integers(5, 200, size=500)


def planner(batching="padded", lengths=LENGTHS, seed=0, weights=None, batch_tokens=1000):
    return epoch_planner(
        batching, lengths, batch_tokens=batch_tokens, row_tokens=250, seed=seed, weights=weights
    )


def documents(batches):
    return [document for batch in batches for row in batch for document in row]


def padded_tokens(batches):
    rows = [[LENGTHS[row].sum() for row in batch] for batch in batches]
    return [len(sums) * padded_length(max(sums)) for sums in rows]


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_one_pass_takes_every_document_once_within_the_budget(batching):
    batches = planner(batching)(0)
    assert sorted(documents(batches)) == list(range(500))
    assert max(padded_tokens(batches)) <= 1024
    bound = {"padded": 1.4, "packed": 1.06}[batching]  # rows of 250 are padded to 256
    assert sum(padded_tokens(batches)) < bound * LENGTHS.sum()


def test_a_padded_row_holds_one_document():
    assert {len(row) for batch in planner("padded")(0) for row in batch} == {1}


def test_packed_rows_are_full_where_documents_allow_it():
    full = [LENGTHS[row].sum() for batch in planner("packed")(0) for row in batch]
    assert max(full) <= 250 and np.mean(full) > 0.97 * 250


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_order_hangs_on_seed_and_epoch_alone(batching):
    assert planner(batching)(3) == planner(batching)(3) != planner(batching)(4)
    assert planner(batching)(3) != planner(batching, seed=1)(3)


def test_weights_say_how_often_a_document_stands_in_a_pass():
    weights = np.repeat([0.5, 1.0, 2.25], [200, 100, 200])
    epochs = [documents(planner(weights=weights)(epoch)) for epoch in range(20)]
    times = np.array([np.bincount(epoch, minlength=500) for epoch in epochs])
    assert (times[:, 200:300] == 1).all()
    assert set(times[:, :200].flat) == {0, 1} and set(times[:, 300:].flat) == {2, 3}
    assert times[:, :200].mean() == pytest.approx(0.5, abs=0.05)
    assert times[:, 300:].mean() == pytest.approx(2.25, abs=0.05)


@pytest.mark.parametrize("start", [0, 1, 37, 99, 100])
def test_starting_late_gives_the_rest(start):
    assert (
        list(BatchSampler(planner(), 100, start=start))
        == list(BatchSampler(planner(), 100))[start:]
    )


def test_epochs_follow_each_other():
    first, second = planner()(0), planner()(1)
    count = len(first) + len(second)
    assert list(BatchSampler(planner(), count)) == first + second


def test_ranks_share_batches_out():
    alone = list(BatchSampler(planner(), 120))
    ranks = [list(BatchSampler(planner(), 40, rank=rank, world=3)) for rank in range(3)]
    assert [batch for three in zip(*ranks, strict=True) for batch in three] == alone
    resumed = list(BatchSampler(planner(), 40, start=25, rank=1, world=3))
    assert resumed == ranks[1][25:]


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_document_longer_than_the_budget_stands_alone(batching):
    epoch = planner(batching, [200, 200], batch_tokens=100)(0)
    assert sorted(documents(epoch)) == [0, 1] and [len(batch) for batch in epoch] == [1, 1]
