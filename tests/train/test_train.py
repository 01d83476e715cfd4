"""Training by its own stage function, on a tiny random Llama."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sessions import session_of
from tiny_models import build_model
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.config import Config
from medusa_exp.config import HeadConfig as Head
from medusa_exp.data.batching import label_positions
from medusa_exp.data.datamodule import collate
from medusa_exp.data.examples import Example
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads, load_heads
from medusa_exp.model.heads import heads as heads_module
from medusa_exp.model.loss import (
    Objective,
    medusa_loss,
    medusa_losses,
    teacher_labels,
)
from medusa_exp.model.targets import TokenTargets
from medusa_exp.stages import session, train
from medusa_exp.train.optimizer import warmup_cosine


def run(config: Config, out: Path) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    return train.run(config, out)


def test_writes_heads_and_the_promised_metrics(config, tmp_path):
    metrics = run(config, tmp_path / "run")
    for k in (1, 2):
        for name in ("train/loss_head", "val/loss_head", "val/top1_head", "val/top5_head"):
            assert f"{name}{k}" in metrics
    assert metrics["val/top1_head1"] <= metrics["val/top5_head1"]
    assert load_heads(tmp_path / "run" / "heads").num_heads == 2


def test_the_backbone_is_bit_unchanged_and_in_no_checkpoint(config, tmp_path, monkeypatch):
    seen = []
    load = session.load_backbone
    monkeypatch.setattr(
        session, "load_backbone", lambda *given: seen.append(load(*given)) or seen[0]
    )
    run(config, tmp_path / "run")
    after = seen[0].model.state_dict()
    fresh = load(session_of(config).spec).model.state_dict()
    assert all(torch.equal(after[name], fresh[name]) for name in after)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(name.startswith("heads.") for name in saved["state_dict"])


@pytest.mark.parametrize("features", ["online", "cache"])
def test_a_model_without_sdpa_is_trained_on(config, tmp_path, tokenizer, features):
    model = build_model("gemma2")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    config.train.features = features

    assert run(config, tmp_path / "run")["train/steps"] == 12


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
        labels_BT = teacher_labels(backbone, hidden_BTD, batch)
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
    tokenizer = session_of(config).tokenizer()
    backbone = session_of(config).backbone()
    samples = session_of(config).tokenized(tokenizer, 128).split("train")[:8]
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
            targets = TokenTargets(ids_BT)
            labeled = label_positions(mask_BT, one_BT, 2)
            losses = medusa_losses(heads, hidden_BTD, targets, labeled, ids_BT, chunk_rows=64)
            total = total + medusa_loss(losses, 0.8)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.25 * values[0]


def test_a_step_takes_the_mean_over_the_labels_of_all_its_micro_batches(
    config, tmp_path, monkeypatch
):
    batches, gradients = [], []
    step = train.MedusaModule.training_step

    def spy(module, batch, batch_idx):
        batches.append(batch)
        return step(module, batch, batch_idx)

    def keep(module, optimizer):
        gradients.append([p.grad.clone() for p in module.heads.parameters()])

    monkeypatch.setattr(train.MedusaModule, "training_step", spy)
    monkeypatch.setattr(train.MedusaModule, "on_before_optimizer_step", keep, raising=False)
    config.dtype.precision = "32-true"
    config.train.accumulate, config.train.max_steps = 3, 1
    config.train.coefficient, config.train.gradient_clip = 0.5, 1e6
    logged = run(config, tmp_path / "run")
    assert len(batches) == 3 and len({batch.is_trained_BT.sum() for batch in batches}) > 1
    backbone = session_of(config).backbone()
    heads = build_heads(backbone, num_heads=2)
    total = [0.0, 0.0]
    for batch in batches:
        hidden_BTD = backbone.hidden_states(batch.input_ids_BT)
        targets = TokenTargets(teacher_labels(backbone, hidden_BTD, batch))
        rest = (label_positions(batch.is_trained_BT, batch.example_BT, 2), batch.input_ids_BT)
        losses = medusa_losses(heads, hidden_BTD, targets, *rest, chunk_rows=64)
        assert batch.group_labels == [sum(b) for b in zip(*map(counts, batches), strict=True)]
        for k, loss in enumerate(losses):
            total[k] = total[k] + loss.loss_sum / batch.group_labels[k + 1]
    loss = 0.8 * total[0] + 0.64 * total[1]
    assert logged["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(0.5 * loss, list(heads.parameters()))
    for mine, theirs in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def counts(batch) -> list[int]:
    return [len(index_R) for index_R in label_positions(batch.is_trained_BT, batch.example_BT, 2)]


@pytest.mark.parametrize(
    ("loss", "teacher"), [("kl", "full"), ("topk_kl", "full"), ("lk", "full"), ("tv", "top_k")]
)
def test_training_on_the_backbones_distribution(config, tmp_path, loss, teacher):
    config.train.loss, config.train.teacher = loss, teacher
    config.train.coefficient_schedule = "sine"
    metrics = run(config, tmp_path / "run")
    assert 0 < metrics["train/loss_head1"] < 20


def test_the_coefficient_rises():
    for schedule, expected in (("constant", [2, 2, 2, 2]), ("linear", [0.5, 1, 1.5, 2])):
        objective = Objective(coefficient=2.0, coefficient_schedule=schedule)
        assert [objective.factor(step, 4) for step in range(4)] == expected
    sine = Objective(coefficient_schedule="sine")
    assert sine.factor(1, 4) == pytest.approx(0.5**0.5) and sine.factor(3, 4) == 1


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


def test_heads_go_on_from_what_was_saved_in_a_bf16_backbones_run_too(config, tmp_path):
    config.dtype.backbone = "bfloat16"
    config.head = Head(num_heads=2, kind="medusa_lowrank", rank=64)  # it is no wider than 32
    config.train.max_steps = 2
    run(config, tmp_path / "first")
    config.train.heads_from = str(tmp_path / "first")
    config.train.learning_rate = 1e-9  # far less than bf16 would round away
    run(config, tmp_path / "second")
    first, second = (load_heads(tmp_path / n / "heads").state_dict() for n in ("first", "second"))
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["recurrent", "auto"])
def test_heads_that_are_gone_on_from_decide_on_their_projections(
    config, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(heads_module, "LARGE_VOCABULARY", 60)  # of 64
    monkeypatch.setattr(heads_module, "FREQUENT_TOKENS", 40)
    config.head = Head(num_heads=2, kind="recurrent", num_tokens=40, own_projections=False)
    config.train.max_steps = 2
    run(config, tmp_path / "first")
    config.head = Head(num_heads=2, kind=kind, num_tokens=40)
    run(config, tmp_path / "fresh")
    config.train.heads_from = str(tmp_path / "first")
    run(config, tmp_path / "second")
    places = ("first", "fresh", "second")
    own = [load_heads(tmp_path / place / "heads").config.own_projections for place in places]
    assert own == [False, True, False]
    config.head.own_projections = True
    with pytest.raises(UserError, match=r"own_projections=False, and this run head\.own_proj"):
        run(config, tmp_path / "third")


@pytest.mark.parametrize("format_", ["tgi", "mlc", "vllm_medusa"])
def test_an_export_that_would_be_refused_is_before_anything_long(config, tmp_path, format_):
    config.head, config.export.format = Head(num_heads=2, kind="auto"), format_
    config.stages = ["train", "export"]
    with pytest.raises(UserError, match=rf"^export.format={format_} cannot hold the heads of this"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "data.json").exists()  # no document was read
    config.head.kind, config.train.max_steps = "medusa", 1
    run(config, tmp_path / "run")
    config.head.kind, config.stages = "auto", ["train"]  # which promises no export
    run(config, tmp_path / "other")


def test_rows_that_an_exported_model_would_lack_are_told_before_the_training(config, tmp_path):
    config.stages, config.export.format = ["train", "export"], "hf_generate"
    config.tokenizer.additional_special_tokens = ["<x>"]
    config.tokenizer.resize_embedding, config.train.max_steps = True, 1
    with pytest.raises(UserError, match=r"rows that its files lack: save the model with"):
        run(config, tmp_path / "run")
    config.tokenizer.additional_special_tokens = []
    run(config, tmp_path / "run")


@pytest.mark.parametrize("stage", ["calibrate", "evaluate"])
def test_prompts_without_room_are_told_before_the_training(config, tmp_path, stage):
    config.stages, config.tree.kind = ["train", stage], "chain"
    config.train.val_prompts, config.decode.max_new_tokens = 0, 120  # of 128 positions
    with pytest.raises(UserError, match=r"no held-out prompt is left"):
        run(config, tmp_path / "run")
    config.stages, config.train.max_steps = ["train"], 1
    run(config, tmp_path / "run")


@pytest.mark.parametrize("kind", ["calibrated", "dynamic"])
def test_a_tree_that_nothing_calibrates_is_told_before_the_training(config, tmp_path, kind):
    config.stages, config.tree.kind = ["train", "evaluate", "calibrate"], kind
    config.train.max_steps, config.decode.max_new_tokens = 1, 8
    with pytest.raises(UserError, match=r"calibration\.json does not exist: run stage calibrate"):
        run(config, tmp_path / "run")
    config.stages = ["train", "calibrate", "evaluate"]
    run(config, tmp_path / "run")


@pytest.mark.parametrize(("limit", "taken"), [(100_000, "rooted"), (10, "recurrent")])
def test_auto_heads_are_recurrent_where_the_vocabulary_is_large(
    config, tmp_path, monkeypatch, caplog, limit, taken
):
    monkeypatch.setattr(heads_module, "LARGE_VOCABULARY", limit)
    monkeypatch.setattr(heads_module, "FREQUENT_TOKENS", number := 40)
    caplog.set_level("INFO")
    # Saved configs of before there was a choice say so of auto, whatever it stands for.
    config.head = Head(num_heads=2, kind="auto", own_projections=False)
    config.train.max_steps = 2
    shared = session.Session(config, tmp_path)
    train.run(config, tmp_path, shared)
    found = load_heads(tmp_path / "heads").config
    number = number if taken == "recurrent" else None
    assert (found.kind, found.num_tokens) == (taken, number)
    assert shared.notes.entry == {**shared.notes.entry, "head_kind": taken}
    frequent = f" and head.num_tokens={number}" if number else ""
    assert caplog.text.count(f"head.kind=auto: {taken}{frequent}, for a vocabulary of ") == 1
    config.head.kind, config.head.num_tokens = (
        taken,
        number,
    )  # by its name it is the same training, which is done
    assert run(config, tmp_path)["train/steps"] == 2
    assert "resum" in caplog.text


def test_off_a_terminal_a_training_says_how_far_it_is(
    config, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setattr("medusa_exp.runs.progress.BETWEEN_LINES", 0.0)
    caplog.set_level("INFO")
    config.train.accumulate = 2
    run(config, tmp_path / "run")
    said = [line for line in caplog.messages if line.startswith("training: ")]
    assert [line.split(",")[0] for line in said] == [f"training: {n} of 12" for n in range(1, 13)]
    shown = capsys.readouterr()
    assert "12/12" in shown.err
    assert "Epoch" not in shown.out


def test_a_model_that_ignores_tree_masks_is_refused_before_the_training(
    config, tmp_path, tokenizer, monkeypatch
):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
    falcon = AutoConfig.for_model("falcon", vocab_size=len(tokenizer), **shape)
    AutoModelForCausalLM.from_config(falcon).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(train, "build_heads", None)
    for features in ("cache", "online"):
        config.train.features = features
        with pytest.raises(UserError, match="cannot be decoded with trees"):
            run(config, tmp_path / "run")
    assert not (tmp_path / "cache/features").exists() and not (tmp_path / "run/heads").exists()
