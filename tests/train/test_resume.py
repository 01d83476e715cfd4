"""A training that is interrupted goes on as if nothing had been."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interrupted import dies_at
from transformers import AutoModelForCausalLM

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.model import load_heads
from medusa_exp.stages import train
from medusa_exp.train.checkpointing import made_of, random_state, restore_random_state

KILLED = Path(__file__).parents[1] / "support" / "killed.py"


def history(out: Path) -> dict[int, float]:
    """Return step -> training loss; a line written again after a resume counts last."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def run(config: Config, out: Path) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    return train.run(config, out)


@pytest.mark.parametrize("kind", ["medusa", "recurrent"])
def test_resume_gives_the_same_loss_curve_and_the_same_heads(config, tmp_path, monkeypatch, kind):
    """The interrupted run dies at step 9; its newest checkpoint is of step 8."""
    if kind == "recurrent":
        config.head.kind, config.train.own_drafts_from = kind, 0.5
        config.train.loss, config.train.head_weights = "lk", "acceptance"
    monkeypatch.setattr("medusa_exp.train.trainer.LOG_EVERY", 1)
    run(config, tmp_path / "whole")
    with dies_at(9):
        run(config, tmp_path / "cut")
    assert not (tmp_path / "cut" / "heads").exists()
    run(config, tmp_path / "cut")
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    whole, cut = (load_heads(tmp_path / n / "heads").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_training_that_knows_a_rounded_model_by_its_former_name_goes_on(
    config, tmp_path, monkeypatch, caplog
):
    config.dtype.backbone, config.train.features = "float16", "online"
    with monkeypatch.context() as earlier:  # versions that named it by its rounded weights
        earlier.setattr("medusa_exp.model.loading._names", lambda spec: None)
        with dies_at(9):
            run(config, tmp_path / "run")
    caplog.set_level("INFO")
    run(config, tmp_path / "run")
    assert "last.ckpt, step 8" in caplog.text


def test_never_resuming_starts_again(config, tmp_path):
    run(config, tmp_path / "run")
    config.train.resume = "never"
    config.train.max_steps = 3
    assert run(config, tmp_path / "run")["train/steps"] == 3


@pytest.mark.parametrize("group", ["head", "train", "dataset", "model"])
def test_a_checkpoint_of_other_settings_is_not_resumed(config, tmp_path, group):
    run(config, tmp_path / "run")
    if group == "head":
        config.head.num_heads = 3
    elif group == "train":
        config.train.learning_rate = 1e-4
    elif group == "model":  # of the same lm_head
        model = AutoModelForCausalLM.from_pretrained(config.model.path)
        torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
        model.save_pretrained(config.model.path)
    else:
        Path(config.dataset.path).write_text(Path(config.dataset.path).read_text() + " ")
    with pytest.raises(UserError, match=r"last\.ckpt was made with another .* train.resume=never"):
        run(config, tmp_path / "run")
    config.train.resume = "never"
    run(config, tmp_path / "run")


def test_what_another_training_has_otherwise_is_said_by_key(config, tmp_path):
    config.train.max_steps = 2
    run(config, tmp_path / "run")
    config.train.max_steps, config.head.num_heads, config.seed = 3, 3, 7
    others = r"train\.max_steps \(2 then, 3 now\), seed \(0 then, 7 now\): set train.resume=never"
    with pytest.raises(UserError, match=rf"another head\.num_heads \(. then, 3 now\), {others}"):
        run(config, tmp_path / "run")
    path = tmp_path / "run/checkpoints/last.ckpt"
    old = torch.load(path, weights_only=True)
    del old["made_of"]  # as older versions wrote it
    torch.save(old, path)
    with pytest.raises(UserError, match=r"made with another head, train, dataset, tokenizer"):
        run(config, tmp_path / "run")


def test_what_may_be_a_secret_is_in_no_checkpoint(config):
    config.train.heads_from = "/home/somebody/heads"
    backbone = SimpleNamespace(weights_fingerprint=lambda: "weights")
    sections = (config.head, config.train, config.dataset)
    found = made_of(*sections, seed=0, data_key="data", backbone=backbone)
    assert "somebody" not in str(found)
    config.train.heads_from = "/home/somebody/others"
    other = made_of(*sections, seed=0, data_key="data", backbone=backbone)
    assert [n for n in found if found[n] != other[n]] == ["train.heads_from"]


@pytest.mark.parametrize("part", [slice(0), slice(5000), slice(64, None)])
def test_a_damaged_checkpoint_is_named(config, tmp_path, part):
    config.train.max_steps = 1
    run(config, tmp_path / "run")
    path = tmp_path / "run/checkpoints/last.ckpt"
    path.write_bytes(path.read_bytes()[part])
    with pytest.raises(UserError, match=r"last\.ckpt is damaged .* train.resume=never"):
        run(config, tmp_path / "run")


def test_what_was_left_half_written_is_removed(config, tmp_path):
    config.train.max_steps = 1
    out = tmp_path / "run"
    unfinished = [out / "checkpoints/.last.ckpt.partial-0", out / ".backbone.partial-0/model"]
    for path in unfinished:
        path.parent.mkdir(parents=True)
        path.touch()
    run(config, out)
    assert not list(out.rglob("*.partial-*"))


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(config, tmp_path):
    config.train.max_steps, config.train.accumulate = 40, 2
    config.train.val_every, config.train.checkpoint_every = 6, 3
    (tmp_path / "config").write_bytes(pickle.dumps(config))

    def train(name: str, *signals: str) -> list[int]:
        command = [sys.executable, KILLED, tmp_path / "config", tmp_path / name, "0", *signals]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        if "SIGTERM" in signals:
            assert "training was stopped by SIGTERM after step" in done.stderr
        return json.loads(done.stdout)

    assert train("whole") == [0]
    resumed = train("killed", "SIGKILL", "SIGTERM", "SIGKILL", "SIGKILL")
    assert resumed == sorted(resumed) and resumed[-1] > 6
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    whole, cut = (load_heads(tmp_path / n / "heads").state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_random_numbers_of_every_library_are_kept(tmp_path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.save(random_state(), tmp_path / "state")
    expected = draws()
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draws() == expected
