"""A micro-batch waits for nothing on the device: no value of a tensor is read, and no size hangs on
one. In torch's fake mode tensors have no values, and whoever asks for one is told so."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import build_model
from torch._subclasses.fake_tensor import (  # private: torch 2.13
    DataDependentOutputException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode  # private: torch 2.13

from medusa_exp.config import DecodeConfig, TrainConfig, TreeConfig
from medusa_exp.data.datamodule import Batch, collate
from medusa_exp.data.examples import Example
from medusa_exp.model import Backbone, build_heads
from medusa_exp.train.defaults import settle, with_objective
from medusa_exp.train.module import MedusaModule

HEADS = 2


class Seen(TorchDispatchMode):
    """Notes each operation that reads a value, and all copies between devices."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.reads, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.name().removeprefix("aten::"), kwargs or {}
        self.reads += [name] * (name.split(".")[0] in self.READS)
        if name == "_to_copy" and "device" in kwargs:
            self.copies.append(kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


def batch_of(is_packed: bool) -> Batch:
    rng = np.random.default_rng(0)
    lengths = (40, 20, 30)
    made = [Example(rng.integers(1, 60, n, np.int32), np.arange(n) > n // 3) for n in lengths]
    rows = [made] if is_packed else [[example] for example in made]
    batch = collate(rows, num_heads=HEADS)
    batch.group_labels = [len(index_R) for index_R in batch.labeled]
    return batch


def without_values(batch: Batch, mode: FakeTensorMode) -> None:
    for name in ("input_ids_BT", "is_trained_BT", "example_BT", "positions_BT", "any_labeled"):
        if (values := getattr(batch, name)) is not None:
            setattr(batch, name, mode.from_tensor(values))
    batch.labeled = [mode.from_tensor(index_R) for index_R in batch.labeled]


def module_of(head: dict, settings: TrainConfig) -> MedusaModule:
    backbone = Backbone(build_model("llama"))
    module = MedusaModule(
        backbone,
        build_heads(backbone, num_heads=HEADS, **head),
        settle(
            with_objective(settings, DecodeConfig(), TreeConfig()),
            memory=None,
            vocabulary=64,
            trained=1,
            rate=2e-3,
        ),
        max_steps=10,
        responses=list,
        max_rank=5,
        key="key",
    )
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_step=0)
    module._fabric = None
    module.log = module.log_dict = lambda *given, **more: None
    return module


SETTINGS = [
    ({}, {}, False),
    ({}, {"loss_form": "at_once"}, True),
    ({}, {"labels": "data", "loss_chunk_rows": 8}, False),
    ({}, {"loss": "kl"}, True),
    ({}, {"loss": "lk", "head_weights": "acceptance", "loss_form": "at_once"}, True),
    ({}, {"loss": "kl", "head_weights": "acceptance"}, False),
    ({}, {"loss": "lk"}, False),
    ({}, {"loss": "nla", "teacher": "top_k", "loss_form": "at_once"}, True),
    ({}, {"loss": "topk_kl", "top_k": 4, "coefficient_schedule": "sine"}, False),
    ({"kind": "hydra"}, {}, False),
    ({"kind": "rooted"}, {"loss_form": "at_once"}, True),
    ({"kind": "recurrent"}, {}, True),
    ({"kind": "medusa_tied", "prefix_attention": True}, {}, True),
    (
        {"kind": "medusa_lowrank", "num_tokens": 40, "token_counts": torch.arange(64, 0, -1)},
        {"loss_form": "at_once"},
        False,
    ),
]


@pytest.mark.parametrize(("head", "settings", "is_packed"), SETTINGS)
def test_a_micro_batch_reads_no_value(head, settings, is_packed):
    module = module_of(head, TrainConfig(**settings))
    module.backbone.next_logits(module.backbone.hidden_states(torch.ones(1, 2).long()))  # once
    batch = batch_of(is_packed)
    seen = Seen()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, seen:
        without_values(batch, mode)
        loss = module.training_step(batch, 0)
        loss.backward()
        module.on_train_batch_end(None, batch, 0)
        with pytest.raises(DataDependentOutputException):
            module.on_before_optimizer_step(None)  # which is once an optimizer step
    assert module.last_metrics.keys() >= {"train/loss", "train/loss_head1"}
    assert set(seen.reads) <= {"_local_scalar_dense"} and len(seen.reads) <= 1


def test_a_batch_is_sent_without_a_wait(monkeypatch):
    """From memory that may be paged out, a copy would wait for all that is to be done before."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    batch, seen = batch_of(is_packed=True), Seen()
    sizes = [len(index_R) for index_R in batch.labeled]
    with FakeTensorMode() as mode, seen:
        without_values(batch, mode)
        there = batch.to(torch.device("cuda:0"))
    assert there.input_ids_BT.device.type == there.labeled[1].device.type == "cuda"
    assert [len(index_R) for index_R in there.labeled] == sizes
    assert len(seen.copies) == len(pinned) == 5 and all(seen.copies)
