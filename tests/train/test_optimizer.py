"""Optimizers, the moving average, and the preview of what a training takes."""

import sys

import pytest
import torch
from interrupted import dies_at

from medusa_exp.config import HeadConfig as Head
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads, load_heads
from medusa_exp.stages import train
from medusa_exp.train import optimizer as optimizer_module
from medusa_exp.train.callbacks import EMAHeads
from medusa_exp.train.checkpointing import random_state
from medusa_exp.train.module import MedusaModule
from medusa_exp.train.optimizer import MuonAndAdamW, build_optimizer, warmup_cosine


def run(config, out):
    out.mkdir(exist_ok=True)
    return train.run(config, out)


def step(optimizer, heads, seed):
    torch.manual_seed(seed)
    loss = heads(torch.randn(200, 32)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_muon_turns_the_blocks_and_adamw_the_rest(backbone):
    heads = build_heads(backbone, num_heads=2)
    optimizer = build_optimizer("muon", heads, learning_rate=0.01, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    step(optimizer, heads, 0)
    moved = {name: p.detach() - before[name] for name, p in heads.named_parameters()}
    assert all(change.any() for change in moved.values())
    singular = torch.linalg.svdvals(moved["blocks.0.0.linear.weight"])
    gradient = torch.linalg.svdvals(heads.blocks[0][0].linear.weight.grad)
    assert singular[0] / singular[15] < 2 < gradient[0] / gradient[15]  # orthogonal, about
    assert moved["lm_heads.0.weight"].abs().max() < 0.0101 + 0.001 * 10  # at most the learning rate
    parts = [len(group["params"]) for group in optimizer.param_groups]
    assert sum(parts) == len(before)
    decaying = {p.ndim for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decaying == {2}


def test_muon_and_adamw_go_on_from_their_state(backbone):
    def fresh():
        torch.manual_seed(0)
        heads = build_heads(backbone, num_heads=2)
        optimizer = build_optimizer("muon", heads, learning_rate=0.01, weight_decay=0.0)
        return heads, optimizer, warmup_cosine(optimizer, 0.5, 4)

    def steps(numbers, heads, optimizer, schedule):
        for number in numbers:
            step(optimizer, heads, number)
            schedule.step()

    whole, *rest = fresh()
    steps(range(4), whole, *rest)
    first, optimizer, schedule = fresh()
    steps(range(2), first, optimizer, schedule)
    second, later, its_schedule = fresh()
    second.load_state_dict(first.state_dict())
    later.load_state_dict(optimizer.state_dict())
    its_schedule.load_state_dict(schedule.state_dict())
    assert isinstance(later, MuonAndAdamW)
    assert {g["lr"] for g in later.param_groups} == {g["lr"] for g in optimizer.param_groups}
    steps(range(2, 4), second, later, its_schedule)
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["medusa", "medusa_tied"])
def test_training_with_muon(config, tmp_path, kind):
    config.head = Head(kind=kind, num_heads=2)
    config.train.optimizer, config.train.max_steps = "muon", 2
    first = run(config, tmp_path / "first")["val/loss_head1"]
    config.train.max_steps = 40
    assert run(config, tmp_path / "run")["val/loss_head1"] < first
    assert load_heads(tmp_path / "run" / "heads").config.kind == kind


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fused_optimizer_takes_the_same_steps(config, tmp_path, monkeypatch, optimizer):
    """It is for GPUs, and runs on a CPU too; its gradients are clipped all the same."""
    config.train.optimizer, config.train.gradient_clip = optimizer, 1e-3
    run(config, tmp_path / "plain")
    monkeypatch.setattr(MedusaModule, "is_fused", True)
    built = []
    adamw = optimizer_module.AdamW
    monkeypatch.setattr(
        optimizer_module, "AdamW", lambda *a, **k: built.append(k["fused"]) or adamw(*a, **k)
    )
    run(config, tmp_path / "fused")
    assert built == [True]
    plain, fused = (load_heads(tmp_path / n / "heads").state_dict() for n in ("plain", "fused"))
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)


def test_muon_without_a_matrix_for_it(config, tmp_path):
    config.head.num_layers, config.train.optimizer = 0, "muon"
    with pytest.raises(
        UserError, match=r"num_layers=0 have no matrix for it\. Set train\.optimizer=adamw"
    ):
        run(config, tmp_path / "run")


def test_eight_bits_need_their_library(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config.train.optimizer = "adamw_8bit"
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install"):
        run(config, tmp_path / "run")


def test_the_average_follows_and_takes_the_heads_place(backbone):
    heads = build_heads(backbone, num_heads=1)
    average = EMAHeads(0.9, heads)
    start = [p.clone() for p in heads.parameters()]
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(1.0)
    trainer = type("T", (), {"accumulate_grad_batches": 2})
    average.on_train_batch_end(trainer, None, None, None, 0)
    assert all(map(torch.equal, average.average.parameters(), start))
    average.on_train_batch_end(trainer, None, None, None, 1)
    average.on_validation_start(trainer, None)
    for now, before in zip(heads.parameters(), start, strict=True):
        torch.testing.assert_close(now, before + 0.1)
    average.on_validation_end(trainer, None)
    for now, before in zip(heads.parameters(), start, strict=True):
        torch.testing.assert_close(now, before + 1.0)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_average_is_what_is_kept_and_goes_on_after_a_stop(config, tmp_path, keep):
    config.train.keep, config.train.average = keep, 0.8
    run(config, tmp_path / "whole")
    with dies_at(9):
        run(config, tmp_path / "cut")
    run(config, tmp_path / "cut")
    whole, cut = (load_heads(tmp_path / n / "heads").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    last = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(last["heads.lm_heads.0.weight"], whole["lm_heads.0.weight"])


def test_an_average_of_9ce118e_goes_on(backbone):
    """That is how its checkpoints have the state: by the name of the class then."""
    average = EMAHeads(0.9, build_heads(backbone, num_heads=1))
    assert average.state_key == "AverageHeads"
    saved = [torch.randn_like(p) for p in average.trained]
    average.load_state_dict({"average": saved})
    assert all(map(torch.equal, average.state_dict()["average"], saved))
    assert all(map(torch.equal, average.average.parameters(), saved))


def test_the_preview_is_logged_and_changes_nothing(config, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    config.train.accumulate = 2
    run(config, tmp_path / "with")
    for part in (
        "parameters trained: 0.02 M, ",
        "labels of head 1) takes ",
        ": 2 more, about 0 min",
    ):
        assert part in caplog.text
    monkeypatch.setattr(train.TrainingPreview, "on_train_batch_end", lambda *_: None)
    run(config, tmp_path / "without")
    one, other = (load_heads(tmp_path / n / "heads").state_dict() for n in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert set(random_state()) >= {"python", "numpy", "torch"}
