"""Validation by what heads are worth in decoding."""

import pytest
import torch
from tiny_models import build_longrope

from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads, load_heads
from medusa_exp.stages import train
from medusa_exp.stages.calibrate import head_ranks as calibrated_ranks
from medusa_exp.stages.session import Session
from medusa_exp.stages.training_inputs import open_inputs
from medusa_exp.train.acceptance import accept_lengths, respond_to_prompts, response_ranks
from medusa_exp.train.module import MedusaModule
from medusa_exp.tree import chain


@pytest.fixture
def config(config) -> Config:
    config.dtype.precision = "32-true"
    config.decode.max_new_tokens = 16
    config.train.val_prompts = 5
    return config


def noisy_heads(backbone, num_heads=3, **options):
    torch.manual_seed(0)
    heads = build_heads(backbone, num_heads=num_heads, **options)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return heads


def test_the_chains_steps_are_those_that_decoding_takes(config, tmp_path):
    made = open_inputs(Session(config, tmp_path))
    heads = noisy_heads(made.backbone)
    prompts = made.prompts
    assert prompts
    limits = Limits(16, made.backbone.eos_token_ids | {made.tokenizer.eos_token_id})
    asked = [prompt.input_ids for prompt in prompts]
    decoded = Decoder(made.backbone, heads, chain(3)).decode(asked, limits)
    tokens = [answer.tokens for answer in decoded]
    assert [answer.tokens_P.tolist() for answer in made.responses] == tokens
    steps = sum(len(answer.accept_lengths) for answer in decoded)
    tree, over_chain = accept_lengths(heads, made.responses, 8, 10)
    assert over_chain == pytest.approx(sum(map(len, tokens)) / steps)
    assert over_chain <= tree or tree == pytest.approx(over_chain)


def test_prompts_of_both_sides_of_a_longrope_boundary_are_answered():
    backbone = Backbone(build_longrope())
    prompts = [Prompt(str(n), "", "", [*range(1, n + 1)]) for n in (50, 9, 28)]
    alone = [respond_to_prompts([prompt], Limits(12), backbone)[0] for prompt in prompts]
    together = respond_to_prompts(prompts, Limits(12), backbone)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens_P.tolist() == other.tokens_P.tolist()
        torch.testing.assert_close(one.hidden_TD, other.hidden_TD)


@pytest.mark.parametrize("prefix_attention", [False, True])
def test_ranks_are_those_of_calibration(config, tmp_path, prefix_attention):
    made = open_inputs(Session(config, tmp_path))
    heads = noisy_heads(made.backbone, prefix_attention=prefix_attention)
    prompts = made.prompts
    assert prompts
    for prompt, answer in zip(prompts, made.responses, strict=True):
        expected = calibrated_ranks(
            made.backbone, heads, prompt.input_ids, answer.tokens_P.tolist(), 6
        )
        found = response_ranks(heads, answer, 6)
        assert (found == expected).all()


def test_answers_are_made_once(config, tmp_path, monkeypatch):
    first = open_inputs(Session(config, tmp_path)).responses
    monkeypatch.setattr("medusa_exp.train.acceptance.decode_plain", None)
    again = open_inputs(Session(config, tmp_path)).responses
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.hidden_TD, other.hidden_TD)
        assert torch.equal(one.tokens_P, other.tokens_P)


@pytest.fixture
def scripted(config, monkeypatch) -> Config:
    """Validations, at steps 2, 4, ... , that find 1, 3, 2, 2, 2, 5."""
    values = iter([1.0, 3.0, 2.0, 2.0, 2.0, 5.0])
    monkeypatch.setattr("medusa_exp.train.module.accept_lengths", lambda *_: (next(values), 1.0))
    kept = {}
    end = MedusaModule.on_validation_epoch_end

    def spy(module):
        end(module)
        kept[module.global_step] = [p.clone() for p in module.heads.parameters()]

    monkeypatch.setattr(MedusaModule, "on_validation_epoch_end", spy)
    config.train.val_every, config.train.max_steps = 2, 10
    config.kept = kept
    return config


def heads_of(path):
    return list(load_heads(path / "heads").parameters())


@pytest.mark.parametrize(("keep", "step"), [("best", 4), ("last", 10)])
def test_which_heads_are_kept(scripted, tmp_path, keep, step):
    scripted.train.keep = keep
    metrics = train.run(scripted, tmp_path)
    assert all(map(torch.equal, heads_of(tmp_path), scripted.kept[step]))
    assert metrics["val/accept_length"] == {"best": 3.0, "last": 2.0}[keep]
    assert metrics.get("train/best_step", 10) == step and metrics["train/steps"] == 10


def test_training_stops_where_it_gets_no_better(scripted, tmp_path):
    scripted.train.patience = 2
    metrics = train.run(scripted, tmp_path)
    assert metrics["train/steps"] == 8 and max(scripted.kept) == 8
    assert all(map(torch.equal, heads_of(tmp_path), scripted.kept[4]))


def test_the_lost_heads_of_the_best_validation_are_named(scripted, tmp_path):
    train.run(scripted, tmp_path)
    (tmp_path / "checkpoints/best-4.safetensors").unlink()
    with pytest.raises(UserError, match=r"best-4\.safetensors is missing .* train.keep=last"):
        train.run(scripted, tmp_path)
    scripted.train.keep = "last"
    assert train.run(scripted, tmp_path)["train/steps"] == 10


def test_the_best_of_a_checkpoint_outlives_a_better_one_that_was_never_saved(
    scripted, tmp_path, monkeypatch
):
    scripted.train.checkpoint_every = 5
    found = {2: 1.0, 4: 3.0, 6: 7.0}  # and at step 8 it breaks
    steps = iter((2, 4, 6, 8))
    monkeypatch.setattr(
        "medusa_exp.train.module.accept_lengths", lambda *_: (found[next(steps)], 1.0)
    )
    with pytest.raises(KeyError):
        train.run(scripted, tmp_path)
    monkeypatch.setattr("medusa_exp.train.module.accept_lengths", lambda *_: (2.0, 1.0))
    metrics = train.run(scripted, tmp_path)
    assert metrics["train/best_step"] == 4 and metrics["val/accept_length"] == 3.0
    assert all(map(torch.equal, heads_of(tmp_path), scripted.kept[4]))
    assert [path.name for path in tmp_path.glob("checkpoints/best*")] == ["best-4.safetensors"]


def test_no_prompt_to_answer_is_said_and_training_goes_on(config, tmp_path, caplog):
    config.decode.max_new_tokens = 4000
    metrics = train.run(config, tmp_path)
    assert "no val/accept_length: no held-out prompt is left" in caplog.text
    assert "val/accept_length" not in metrics and "val/loss_head1" in metrics
    config.stages = ["train", "calibrate"]  # which would have none to answer either
    for number in (2, 0):
        config.train.val_prompts = number
        with pytest.raises(UserError, match=r"no held-out prompt is left .* leaves 0 tokens"):
            open_inputs(Session(config, tmp_path))
    config.stages = ["train"]
    assert open_inputs(Session(config, tmp_path)).responses == []


@pytest.mark.parametrize(("stage", "split"), [("calibrate", "val"), ("evaluate", "test")])
def test_a_split_that_a_later_stage_needs_is_looked_for_at_once(config, tmp_path, stage, split):
    config.stages, config.tree.kind = ["train", stage], "chain"
    setattr(config.dataset, f"{split}_fraction", 1e-9)
    said = f"stage {stage} would find no prompt: the data set has no conversation for split {split}"
    with pytest.raises(UserError, match=said):
        open_inputs(Session(config, tmp_path))


def test_damaged_answers_are_made_anew(config, tmp_path):
    first = open_inputs(Session(config, tmp_path)).responses
    [path] = (tmp_path / "cache/continuations").glob("*.safetensors")
    whole = path.read_bytes()
    path.unlink()  # `first` is a map of it: the bytes below are another file's
    path.write_bytes(whole[: len(whole) // 2])
    again = open_inputs(Session(config, tmp_path)).responses
    assert len(first) > 0 and path.read_bytes() == whole
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.hidden_TD, other.hidden_TD)
