"""A training that fails, and what it says and leaves."""

import re

import pytest
import torch

from medusa_exp.errors import UserError
from medusa_exp.stages import train
from medusa_exp.train import module


def run(config, out):
    out.mkdir(exist_ok=True)
    return train.run(config, out)


def test_an_infinite_loss_stops_the_run(config, tmp_path, monkeypatch):
    build = module.build_optimizer
    monkeypatch.setattr(
        module, "build_optimizer", lambda *a, **k: build(*a, **{**k, "learning_rate": 1e20})
    )
    config.train.warmup_fraction = 0.0
    message = r"the loss is (nan|inf) at step (\d+), on conversations sums-\d+, .* is from before"
    with pytest.raises(UserError, match=message) as caught:
        run(config, tmp_path / "run")
    step = int(re.search(message, str(caught.value))[2])
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == step
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_of_an_accumulated_step_the_bad_micro_batch_is_named(config, tmp_path, monkeypatch):
    """Before the step: what is saved is what the steps before have made."""
    config.train.accumulate, config.train.max_steps, config.train.checkpoint_every = 3, 6, 2
    computed, named, batch_loss = [], [], train.MedusaModule.batch_loss

    def broken(module, batch, totals):
        computed.append(1)
        loss, sums_H = batch_loss(module, batch, totals)
        if len(computed) != 3 * 5 + 2:  # the second of the sixth step
            return loss, sums_H
        named.extend(batch.numbers)
        return loss * torch.nan, sums_H

    monkeypatch.setattr(train.MedusaModule, "batch_loss", broken)
    with pytest.raises(UserError, match="the loss is nan at step 5, on conversations") as caught:
        run(config, tmp_path / "run")
    assert len(computed) == 3 * 6 and caught.value.__cause__.documents == named
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("step", [8, 12])
def test_weights_that_a_step_has_broken_are_in_no_checkpoint(config, tmp_path, monkeypatch, step):
    """The loss is finite: it is the gradient that overflows."""

    def overflows(module, optimizer):
        if module.global_step == step - 1:
            for parameter in module.heads.parameters():
                parameter.grad.fill_(torch.nan)

    monkeypatch.setattr(train.MedusaModule, "on_before_optimizer_step", overflows, raising=False)
    with pytest.raises(UserError, match=rf"step {step} made NaN .*last\.ckpt is from before"):
        run(config, tmp_path / "run")
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == step - 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert not (tmp_path / "run/heads").exists()


def _far_too_much():
    torch.empty(2**48)


def _no_more_objects():
    raise MemoryError


@pytest.mark.parametrize("fails", [_far_too_much, _no_more_objects])
@pytest.mark.parametrize("place", ["train.module.medusa_losses", "stages.session.load_backbone"])
def test_where_memory_ends_the_message_says_what_to_lower(
    config, tmp_path, monkeypatch, place, fails
):
    def greedy(*arguments, **keywords):
        fails()

    monkeypatch.setattr(f"medusa_exp.{place}", greedy)
    with pytest.raises(UserError, match=r"out of memory .* lower train\.batch_tokens \(now 200\)"):
        run(config, tmp_path / "run")
