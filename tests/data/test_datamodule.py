from itertools import accumulate

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, build_model

from medusa_exp.data.datamodule import Batches, collate
from medusa_exp.data.examples import Example, Examples, Table
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone
from medusa_exp.model.loss import head_labels


def example(ids, trained):
    return Example(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))


A = example([5, 6], [False, True])
B = example([7, 8, 9], [True, True, False])


def test_padding_keeps_to_the_positions_there_are():
    long = example(range(90), [True] * 90)
    assert collate([[long]]).input_ids_BT.shape == (1, 128)
    assert collate([[long]], row_tokens=100).input_ids_BT.shape == (1, 100)
    assert collate([[long]], row_tokens=50).input_ids_BT.shape == (1, 90)


def test_a_document_a_row():
    batch = collate([[A], [B]])
    assert batch.input_ids_BT.shape == batch.is_trained_BT.shape == (2, 64)
    assert batch.input_ids_BT[:, :3].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.is_trained_BT[:, :3].tolist() == [[False, True, False], [True, True, False]]
    assert batch.example_BT[:, :4].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert not batch.input_ids_BT[:, 3:].any() and not batch.is_trained_BT[:, 3:].any()
    assert batch.positions_BT is None


def test_several_documents_a_row():
    batch = collate([[A, B], [B]])
    assert batch.input_ids_BT[:, :6].tolist() == [[5, 6, 7, 8, 9, 0], [7, 8, 9, 0, 0, 0]]
    assert batch.example_BT[:, :6].tolist() == [[1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0]]
    assert batch.positions_BT[:, :6].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0]]


@pytest.mark.parametrize("head", [0, 1, 2])
def test_labels_never_come_from_another_document(head):
    packed, alone = collate([[A, B, A]]), [collate([[document]]) for document in (A, B, A)]

    def labels(batch):
        return head_labels(batch.input_ids_BT, batch.is_trained_BT, batch.example_BT, head)

    index_R, labels_R = labels(packed)
    expected = [labels(batch) for batch in alone]
    assert labels_R.tolist() == [label for _, row in expected for label in row.tolist()]
    starts = accumulate((len(document.input_ids) for document in (A, B)), initial=0)
    assert index_R.tolist() == [
        start + place
        for start, (places, _) in zip(starts, expected, strict=True)
        for place in places.tolist()
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_documents_do_not_see_each_other(architecture):
    backbone = Backbone(build_model(architecture))
    rng = np.random.default_rng(0)
    documents = [example(rng.integers(1, 60, n), [True] * n) for n in (20, 1, 17, 5)]
    batch = collate([documents])
    with torch.inference_mode():
        packed_BTD = backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)
        start = 0
        for document in documents:
            stop = start + len(document.input_ids)
            ids_1T = torch.from_numpy(document.input_ids).long()[None]
            torch.testing.assert_close(
                packed_BTD[:, start:stop], backbone.hidden_states(ids_1T), rtol=1e-4, atol=1e-4
            )
            start = stop
    backbone.check_packing()


def test_a_model_whose_packed_documents_see_each_other_is_refused(backbone, monkeypatch):
    forward = backbone.body.forward
    monkeypatch.setattr(
        backbone.body, "forward", lambda position_ids=None, **kwargs: forward(**kwargs)
    )
    with pytest.raises(UserError, match=r"see each other: set train\.batching=padded"):
        backbone.check_packing()


def table(lengths):
    return Table.of((range(1, n + 1), [1] * n, str(n), "s") for n in lengths)


class FakeTrainer:
    global_step, max_steps, global_rank, world_size = 0, 7, 0, 1


def test_batches_as_a_trainer_asks_for_them():
    data = Examples(table([3, 9, 4, 70, 5]))
    settings = {"batching": "packed", "batch_tokens": 128, "row_tokens": 128, "seed": 0}
    module = Batches(data, data[:2], **settings, val_batches=9, accumulate=2)
    module.trainer = FakeTrainer()
    batches = list(module.train_dataloader())
    assert len(batches) == 14 and module.batches_per_epoch() == 1
    assert all((batch.example_BT > 0).sum() == 91 for batch in batches)
    module.trainer.global_step = 5
    rest = list(module.train_dataloader())
    for late, original in zip(rest, batches[10:], strict=True):
        assert torch.equal(late.input_ids_BT, original.input_ids_BT)
    (val,) = module.val_dataloader()
    assert sorted(val.example_BT.sum(1).tolist()) == [3, 9]
    assert Batches(data, None, **settings).val_dataloader() == []


def test_examples_are_rows_of_the_table():
    data = Examples(table([3, 9, 4, 70, 5]))
    assert data.lengths.tolist() == [3, 9, 4, 70, 5] and len(data) == 5
    assert [example.input_ids[-1] for example in data] == [3, 9, 4, 70, 5]
    some = Examples(table([3, 9, 4, 70, 5]), np.array([4, 1]), np.array([2.0, 0.5]))
    assert some.lengths.tolist() == [5, 9] and some.strings("conversation_id") == ["5", "9"]
    assert some[1].is_trained.dtype == bool and some[1].is_trained.all()
    assert some[1:].weights.tolist() == [0.5] and some.num_trained().tolist() == [5, 9]
    with pytest.raises(IndexError):
        some[2]
