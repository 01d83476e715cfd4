"""Training by its own stage function, on a tiny random Llama."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_exp.config import Config
from medusa_exp.data.examples import Example
from medusa_exp.data.loader import collate
from medusa_exp.data.tokenised import load_tokenised
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads, load_backbone, load_heads, load_tokenizer
from medusa_exp.model.loss import medusa_loss, medusa_losses
from medusa_exp.train import stage
from medusa_exp.train.module import own_choices
from medusa_exp.train.schedule import warmup_cosine


def history(out: Path) -> dict[int, float]:
    """Return step -> training loss; a line written again after a resume counts last."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def run(config: Config, out: Path) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    return stage.run(config, out)


def test_writes_heads_and_the_promised_metrics(config, tmp_path):
    metrics = run(config, tmp_path / "run")
    for k in (1, 2):
        for name in ("train/loss_head", "val/loss_head", "val/top1_head", "val/top5_head"):
            assert f"{name}{k}" in metrics
    assert metrics["val/top1_head1"] <= metrics["val/top5_head1"]
    assert load_heads(tmp_path / "run" / "heads").num_heads == 2


def test_the_backbone_is_bit_unchanged_and_in_no_checkpoint(config, tmp_path, monkeypatch):
    seen = []
    load = stage.load_backbone
    monkeypatch.setattr(stage, "load_backbone", lambda c: seen.append(load(c)) or seen[0])
    run(config, tmp_path / "run")
    after = seen[0].model.state_dict()
    fresh = load(config).model.state_dict()
    assert all(torch.equal(after[name], fresh[name]) for name in after)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(name.startswith("heads.") for name in saved["state_dict"])


def test_training_without_validation(config, tmp_path):
    config.dataset.val_fraction = 0.0
    metrics = run(config, tmp_path / "run")
    assert not any(name.startswith("val/") for name in metrics) and "train/loss" in metrics


def test_own_labels_are_what_the_backbone_says_after_the_same_text(backbone):
    documents = [
        Example(np.arange(1, 9, dtype=np.int32), np.array([False] * 3 + [True] * 5)),
        Example(np.arange(9, 14, dtype=np.int32), np.array([True] * 5)),
    ]
    batch = collate([documents])
    with torch.inference_mode():
        hidden_BTD = backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)
        labels_BT = own_choices(backbone, hidden_BTD, batch)
        expected = []
        for document in documents:
            ids_1T = torch.tensor(document.input_ids).long()[None]
            said = backbone.model(ids_1T).logits[0].argmax(-1).tolist()
            ids, mask = ids_1T[0].tolist(), document.is_trained
            expected += [ids[0]]  # nothing of its own stands before it
            expected += [said[t] if mask[t + 1] else ids[t + 1] for t in range(len(ids) - 1)]
    assert labels_BT[0, : len(expected)].tolist() == expected
    assert not labels_BT[0, len(expected) :].any()


def test_the_loss_falls_on_eight_samples(config):
    tokenizer = load_tokenizer(config)
    backbone = load_backbone(config)
    samples = load_tokenised(config, tokenizer, 128).split("train")[:8]
    heads = build_heads(backbone, num_heads=2)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        total = torch.zeros(())
        for sample in samples:
            ids_BT = torch.tensor(sample.input_ids).long()[None]
            hidden_BTD = backbone.hidden_states(ids_BT)
            mask_BT = torch.tensor(sample.is_trained)[None]
            one_BT = torch.ones_like(ids_BT)
            losses = medusa_losses(heads, hidden_BTD, ids_BT, mask_BT, one_BT, chunk_rows=64)
            total = total + medusa_loss(losses, 0.8)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.25 * values[0]


def test_resume_gives_the_same_loss_curve_and_the_same_heads(config, tmp_path, monkeypatch):
    """The interrupted run dies at step 9; its newest checkpoint is of step 8."""
    monkeypatch.setattr("medusa_exp.train.trainer.LOG_EVERY", 1)
    run(config, tmp_path / "whole")
    step = stage.MedusaModule.training_step

    def dies(module, batch, batch_idx):
        if module.global_step == 9:
            raise RuntimeError("power cut")
        return step(module, batch, batch_idx)

    monkeypatch.setattr(stage.MedusaModule, "training_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, tmp_path / "cut")
    assert not (tmp_path / "cut" / "heads").exists()
    monkeypatch.setattr(stage.MedusaModule, "training_step", step)
    run(config, tmp_path / "cut")
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    whole, cut = (load_heads(tmp_path / n / "heads").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_never_resuming_starts_again(config, tmp_path):
    run(config, tmp_path / "run")
    config.train.resume = "never"
    config.train.max_steps = 3
    run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("group", ["head", "train", "dataset"])
def test_a_checkpoint_of_other_settings_is_not_resumed(config, tmp_path, group):
    run(config, tmp_path / "run")
    if group == "head":
        config.head.num_heads = 3
    elif group == "train":
        config.train.learning_rate = 1e-4
    else:
        Path(config.dataset.path).write_text(Path(config.dataset.path).read_text() + " ")
    with pytest.raises(UserError, match=r"last\.ckpt was made with another .* train.resume=never"):
        run(config, tmp_path / "run")
    config.train.resume = "never"
    run(config, tmp_path / "run")


def test_an_infinite_loss_stops_the_run(config, tmp_path):
    config.train.learning_rate = 1e20
    config.train.warmup_fraction = 0.0
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step"):
        run(config, tmp_path / "run")


def test_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = warmup_cosine(optimizer, 0.2, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0.0)
