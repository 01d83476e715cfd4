"""Hidden states that are made once: what is stored, and that training on them is the same."""

import errno
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sessions import session_of, untimed
from tiny_models import build_model
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp.config import Config
from medusa_exp.data.batching import is_labeled
from medusa_exp.data.feature_cache import Features, stored_positions
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, load_heads
from medusa_exp.model.loading import load_ends
from medusa_exp.model.loss import teacher_labels
from medusa_exp.stages import session, train, training_inputs
from medusa_exp.stages.session import Session
from medusa_exp.stages.training_inputs import open_inputs


def run(config: Config, out):
    out.mkdir(exist_ok=True)
    return train.run(config, out)


def no_body(config, **options):
    raise AssertionError("the backbone's layers are not needed")


@pytest.fixture
def cached(config) -> Config:
    config.train.features = "cache"
    config.dtype.precision = "32-true"
    return config


def test_stored_are_the_positions_that_any_head_learns_from():
    rng = np.random.default_rng(0)
    for size in (1, 5, 60):
        is_trained = rng.random(size) < 0.1
        one_BT = torch.ones(1, size, dtype=torch.long)
        trained_BT = torch.from_numpy(is_trained)[None]
        anywhere = torch.zeros(size, dtype=torch.bool)
        for head in range(min(17, size - 1)):
            anywhere |= is_labeled(trained_BT, one_BT, head)[0]
        assert stored_positions(is_trained, False).tolist() == anywhere.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_batch_has_the_states_and_choices_of_the_backbone(cached, tmp_path, batching):
    cached.train.batching = batching
    made = open_inputs(Session(cached, tmp_path))
    batches = made.batches(cached)
    trainer = {"global_step": 0, "max_steps": 3, "global_rank": 0, "world_size": 1}
    batches.trainer = SimpleNamespace(**trainer)
    for batch in batches.train_dataloader():
        with torch.inference_mode():
            online_BTD = made.backbone.hidden_states(batch.input_ids_BT, batch.positions_BT)
            teacher_BT = teacher_labels(made.backbone, online_BTD, batch)
        stored_BT = torch.zeros_like(batch.is_trained_BT)
        for head in range(17):
            stored_BT |= is_labeled(batch.is_trained_BT, batch.example_BT, head)
        torch.testing.assert_close(batch.hidden_BTD[stored_BT], online_BTD[stored_BT])
        assert not batch.hidden_BTD[~stored_BT].any() and stored_BT.any()
        assert torch.equal(batch.teacher_BT, teacher_BT)


@pytest.mark.parametrize(
    ("loss", "batching", "prefix_attention"),
    [
        ("ce", "padded", False),
        ("topk_kl", "padded", False),
        ("lk", "padded", False),
        ("ce", "padded", True),
        ("ce", "packed", True),
    ],
)
def test_training_on_cached_states_is_the_same_and_loads_no_layer(
    cached, tmp_path, loss, batching, prefix_attention, monkeypatch
):
    cached.train.loss, cached.train.batching = loss, batching
    cached.head.prefix_attention = prefix_attention
    run(cached, tmp_path / "first")
    monkeypatch.setattr(session, "load_backbone", no_body)
    second = run(cached, tmp_path / "second")
    heads = {n: load_heads(tmp_path / n / "heads").state_dict() for n in ("first", "second")}
    assert all(torch.equal(v, heads["second"][name]) for name, v in heads["first"].items())
    monkeypatch.undo()
    cached.train.features = "online"
    online = run(cached, tmp_path / "online")
    assert untimed(online) == pytest.approx(untimed(second), rel=1e-3)
    backbone = session_of(cached).backbone()
    loaded = load_heads(tmp_path / "second" / "heads", backbone)  # identities agree
    assert loaded.num_heads == 2


def test_half_precision_takes_half_the_room(cached, tmp_path):
    exact = open_inputs(Session(cached, tmp_path)).features["train"]
    cached.dtype.precision = "bf16-mixed"
    half = open_inputs(Session(cached, tmp_path)).features["train"]
    assert exact[0][0].dtype == torch.float32 and half[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(half[0][0].float(), exact[0][0], rtol=0.1, atol=0.1)
    sizes = [(found.path / "hidden.npy").stat().st_size - 128 for found in (exact, half)]
    assert sizes[0] == 2 * sizes[1]


def test_other_heads_share_the_states_and_other_data_does_not(cached, tmp_path):
    first = open_inputs(Session(cached, tmp_path)).features["train"].path
    cached.head.num_heads, cached.train.decay = 5, 0.5
    assert open_inputs(Session(cached, tmp_path)).features["train"].path == first
    cached.head.prefix_attention = True  # which looks at all positions
    assert open_inputs(Session(cached, tmp_path)).features["train"].path != first
    cached.head.prefix_attention = False
    cached.dataset.max_length = 20
    assert open_inputs(Session(cached, tmp_path)).features["train"].path != first


def test_another_model_of_the_same_name_has_its_own(cached, tmp_path):
    first = open_inputs(Session(cached, tmp_path)).features["train"].path
    model = build_model("llama", seed=1)
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "model")
    other = open_inputs(Session(cached, tmp_path)).features["train"].path
    assert other != first
    shutil.rmtree(other)
    first.rename(other)
    with pytest.raises(UserError, match=rf"holds hidden states of {tmp_path}/model, or of other"):
        open_inputs(Session(cached, tmp_path))


def test_quantised_weights_of_the_same_files_have_their_own(cached, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=260, num_attention_heads=4, **shape)).save_pretrained(
        tmp_path / "model"
    )
    found = set()
    for bits in (None, "8bit", None, "8bit"):
        cached.model.quantization = bits
        found.add(open_inputs(Session(cached, tmp_path)).features["train"].path)
    assert len(found) == 2


def test_changed_bytes_are_found_when_they_are_read(cached, tmp_path):
    path = open_inputs(Session(cached, tmp_path)).features["train"].path
    with (path / "hidden.npy").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"?")
    features = Features(path)
    features[0]
    with pytest.raises(UserError, match=r"hidden\.npy, document \d+ is not what was written"):
        features[len(features._checks) - 1]
    (path / "starts.npy").write_bytes((path / "checks.npy").read_bytes())
    with pytest.raises(UserError, match=r"starts\.npy is not what was written there: delete"):
        Features(path)


@pytest.mark.parametrize("name", ["hidden.npy", "own.npy", "starts.npy", "summary.json"])
def test_files_that_are_cut_off_or_gone_are_said(cached, tmp_path, name):
    path = open_inputs(Session(cached, tmp_path)).features["train"].path
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{re.escape(name)} is not .*elete"):
        Features(path)
    (path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"\.(npy|json) is not .*elete"):
        Features(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is not what was written .* delete"):
        Features(path)


def test_a_damaged_note_of_a_backbone_is_made_again(cached, tmp_path):
    first = open_inputs(Session(cached, tmp_path)).features["train"].path
    [note] = (tmp_path / "cache/backbones").glob("*.json")
    whole = note.read_text()
    note.write_text(whole[:20])
    assert open_inputs(Session(cached, tmp_path)).features["train"].path == first
    assert note.read_text() == whole


def test_half_made_states_are_not_used(cached, tmp_path, monkeypatch):
    def dies(*arguments):
        (arguments[0] / "hidden.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("medusa_exp.train.precompute._fill", dies)
        with pytest.raises(KeyboardInterrupt):
            open_inputs(Session(cached, tmp_path))
    assert not list((tmp_path / "cache" / "features").glob("*/hidden.npy"))
    open_inputs(Session(cached, tmp_path))


def test_states_are_noted_before_those_of_the_next_split_are_made(cached, tmp_path, monkeypatch):
    made = training_inputs.open_features

    def open_features(cache_dir, split, *more):
        if split == "val":
            raise KeyboardInterrupt
        return made(cache_dir, split, *more)

    monkeypatch.setattr(training_inputs, "open_features", open_features)
    session = Session(cached, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        open_inputs(session)
    [entry] = (tmp_path / "cache/features").glob("[!.]*")
    assert session.notes.entry["features"] == {"train": entry.name}


def test_a_disk_that_is_too_small_is_said_first(cached, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("medusa_exp.train.precompute.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        UserError,
        match=r"hidden states take \d+\.\d kB, .* has 1\.0 kB left.* set train\.features=online",
    ):
        open_inputs(Session(cached, tmp_path))


def test_a_disk_that_others_have_filled_since_is_said_too(cached, tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"features/\w+ could not .*: its disk is full"):
        open_inputs(Session(cached, tmp_path))
    assert not list((tmp_path / "cache" / "features").glob("*.npy"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2", "phi"])
def test_ends_are_those_of_the_whole_model(tmp_path, tokenizer, architecture):
    model = build_model(architecture)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = Config(device="cpu")
    config.model.path = str(tmp_path / "model")
    whole = Backbone(model)
    ends = load_ends(session_of(config).spec, whole.identity(), whole.weights_fingerprint())
    assert torch.equal(ends.lm_head.weight, model.get_output_embeddings().weight)
    assert ends.model.config.get_text_config().num_hidden_layers == 0
    assert ends.identity() == whole.identity() and ends.max_length == whole.max_length
    hidden_RD = torch.randn(3, whole.hidden_size)
    assert torch.equal(ends.next_logits(hidden_RD), whole.next_logits(hidden_RD))
    with pytest.raises(AssertionError, match="only the ends"):
        ends.hidden_states(torch.ones(1, 2, dtype=torch.long))


def test_a_backbone_that_was_noted_before_trees_were_asked_about_is_asked(
    cached, tmp_path, monkeypatch
):
    open_inputs(Session(cached, tmp_path))
    [note] = (tmp_path / "cache/backbones").glob("*.json")
    noted = json.loads(note.read_text())
    asked = []
    monkeypatch.setattr(training_inputs, "check_tree_attention", asked.append)
    for old in (noted[:2], [*noted[:2], "eager"]):
        note.write_text(json.dumps(old))
        open_inputs(Session(cached, tmp_path))
        assert json.loads(note.read_text()) == noted
    assert len(asked) == 2
    assert not open_inputs(Session(cached, tmp_path)).backbone.has_body
