"""Regenerated responses, and one backbone for all stages, on a tiny random Llama."""

import gc
import json
import pickle
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import killed_answers
import pytest
import torch
from sessions import documents_of, session_of
from tiny_models import VOCAB_SIZE, build_model
from transformers import AutoModelForCausalLM

from medusa_exp.cli import run_stages
from medusa_exp.config import RegenerateConfig
from medusa_exp.decode import memory
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.slots import Slots
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.runs.files import Appender
from medusa_exp.stages import regenerate, train
from medusa_exp.stages.regenerate import Document, answer
from medusa_exp.stages.session import Session
from medusa_exp.tree import chain

PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6]]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(build_model("llama"))


def answered(backbone: Backbone, documents: list[Document], *, stop_ids=(), max_length=100):
    decoder = Decoder(backbone)
    slots = decoder.slots(2, max_length, decoder.root_only())
    found = list(answer(documents, slots, Limits(6, stop_ids), max_length, seed=0))
    assert {id(document) for document in found} == {id(document) for document in documents}
    return documents


def plainly(backbone: Backbone, prompt: list[int], stop_ids=()) -> list[int]:
    return decode_plain(backbone, [prompt], Limits(6, stop_ids))[0].tokens


def test_each_turn_is_what_the_backbone_says_after_its_own_answers(backbone):
    stops = range(0, VOCAB_SIZE, 4)  # so that answers come to an end
    contexts = [[prompt, [2, 1], [5]] for prompt in PROMPTS]
    documents = [Document(row, list(turns)) for row, turns in enumerate(contexts)]
    for document in answered(backbone, documents, stop_ids=stops):
        tokens: list[int] = []
        for context, (start, stop) in zip(
            document.contexts, document.answers, strict=document.outcome == "whole"
        ):
            tokens += context
            assert start == len(tokens)
            tokens += plainly(backbone, tokens, stops)
            assert stop == len(tokens)
        assert document.tokens == tokens
    assert {document.outcome for document in documents} >= {"whole"}


def test_an_answer_without_an_end_is_the_last(backbone):
    [document] = answered(backbone, [Document(0, [[3, 4, 5], [2]])])
    assert document.outcome == "unfinished"
    assert document.answers == [(3, 9)] and len(document.tokens) == 9


def test_a_turn_without_room_is_not_asked(backbone):
    documents = [Document(0, [[1] * 15]), Document(1, [[1] * 14])]
    answered(backbone, documents, max_length=20)
    assert [document.outcome for document in documents] == ["no room", "unfinished"]
    assert documents[0].tokens == [] and documents[0].answers == []


@pytest.fixture
def exact(config, tmp_path):
    config.dtype.precision = "32-true"
    config.regenerate = RegenerateConfig(20, num_val_documents=4, batch_size=4, max_new_tokens=16)
    (tmp_path / "run").mkdir()
    return config


def test_the_stage_counts_what_it_wrote(exact, tmp_path):
    metrics = regenerate.run(exact, tmp_path / "run")
    documents = documents_of(exact, tmp_path / "run")
    trained = sum(sum(document["is_trained"]) for document in documents)
    assert metrics["regenerate/tokens"] == trained > 0
    assert metrics["regenerate/documents"] == len(documents) == 24
    assert not any(document["is_trained"][0] for document in documents)
    assert len({document["conversation_id"] for document in documents}) == 24


def test_a_killed_stage_goes_on_without_a_gap_or_a_copy(exact, tmp_path, monkeypatch):
    out = tmp_path / "run"
    regenerate.run(exact, out)
    whole = documents_of(exact, out)
    shutil.rmtree(tmp_path / "cache" / "regenerated")
    append, calls = Appender.append, []

    def stops(file, document):
        append(file, document)
        calls.append(document)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Appender, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            regenerate.run(exact, out)
    [log] = (tmp_path / "cache/regenerated").glob(".*.answers.jsonl")
    assert len(log.read_text().splitlines()) == 8
    *lines, last = log.read_text().splitlines(keepends=True)
    token = json.loads(lines[2])["tokens"][-1]  # it is another one since, and the last line torn
    lines[2] = lines[2].replace(f" {token}]", f" {token ^ 1}]", 1)
    log.write_text("".join(lines) + last[:-40])
    regenerate.run(exact, out)
    assert documents_of(exact, out) == whole
    assert not log.exists()


@pytest.mark.parametrize("rule", ["greedy", "sampling"])
def test_kills_leave_the_answers_of_an_unbroken_run(exact, tmp_path, rule):
    exact.decode.rule, exact.regenerate.batch_size = rule, 3
    regenerate.run(exact, tmp_path / "run")
    whole = documents_of(exact, tmp_path / "run")
    shutil.rmtree(tmp_path / "cache" / "regenerated")
    (tmp_path / "config").write_bytes(pickle.dumps(exact))
    script = Path(killed_answers.__file__)
    command = [sys.executable, script, tmp_path / "config", tmp_path / "killed", "1", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads(done.stdout)
    assert 0 < written[0] < written[1] < written[2] <= len(whole)
    assert documents_of(exact, tmp_path / "killed") == whole


def test_an_answer_does_not_hang_on_the_batch(exact, tmp_path):
    exact.decode.rule = "sampling"
    found = []
    for size in (2, 5):
        exact.regenerate.batch_size = size
        exact.cache_dir = str(tmp_path / f"cache{size}")
        regenerate.run(exact, tmp_path / "run")
        found.append(documents_of(exact, tmp_path / "run"))
    assert found[0] == found[1]


def test_fewer_at_a_time_where_memory_is_short(exact, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 15_000_000)
    exact.regenerate.batch_size = 1000
    with caplog.at_level("WARNING"):
        regenerate.run(exact, tmp_path / "run")
    assert any("of 1000 prompts at a time" in line for line in caplog.messages)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    exact.cache_dir = str(tmp_path / "other")
    with pytest.raises(UserError, match="no room to decode"):
        regenerate.run(exact, tmp_path / "run")


def test_heads_of_the_run_give_the_same_answers(exact, tmp_path):
    out = tmp_path / "run"
    regenerate.run(exact, out)
    plain = documents_of(exact, out)
    shutil.rmtree(tmp_path / "cache" / "regenerated")
    save_heads(build_heads(session_of(exact).backbone(), num_heads=2), out / "heads")
    exact.regenerate.use_heads = True
    with pytest.raises(UserError, match=r"tree\.json does not exist: .* Or choose tree=chain"):
        regenerate.run(exact, out)
    exact.tree.kind = "chain"
    regenerate.run(exact, out)
    assert documents_of(exact, out) == plain
    shutil.rmtree(tmp_path / "cache" / "regenerated")
    chain(2).save(out / "tree.json")
    regenerate.run(exact, out)
    assert documents_of(exact, out) == plain


def test_training_takes_own_answers_and_asks_for_them(exact, tmp_path):
    exact.train.text = "regenerated"
    with pytest.raises(
        UserError, match=r"train\.text=regenerated.*put stage regenerate before train"
    ):
        train.run(exact, tmp_path / "run")
    regenerate.run(exact, tmp_path / "run")
    assert train.run(exact, tmp_path / "run")["train/steps"] == 12
    [path] = (tmp_path / "cache/regenerated").glob("*/documents/input_ids.npy")
    whole = path.read_bytes()
    path.unlink()  # a map of it may be open: the bytes below are another file's
    path.write_bytes(whole[:-200])
    with pytest.raises(UserError, match=r"input_ids\.npy is not what was .* stage regenerate"):
        train.run(exact, tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("export", "format", "tgi", r"export\.format=tgi cannot hold the heads of this run"),
        ("tree", "kind", "dynamic", r"heads of kind=hydra cannot guess ahead of a choice"),
    ],
)
def test_what_training_would_refuse_is_refused_before_anything_is_answered(
    exact, tmp_path, section, key, value, message
):
    exact.stages = ["regenerate", "train", "calibrate", "evaluate", "export"]
    exact.head.kind = "hydra"
    setattr(getattr(exact, section), key, value)
    with pytest.raises(UserError, match=message):
        regenerate.run(exact, tmp_path / "run")
    assert not [*Path(exact.cache_dir).glob("regenerated/*")]


def test_both_stages_note_the_responses_that_they_use(exact, tmp_path):
    exact.train.text = "regenerated"
    session = Session(exact, tmp_path)
    regenerate.run(exact, tmp_path, session)
    key = session.notes.run["cache_keys"].pop("regenerated")
    train.run(exact, tmp_path, session)
    assert session.notes.run["cache_keys"]["regenerated"] == key


def test_where_memory_ends_the_message_says_what_to_lower(exact, tmp_path, monkeypatch):
    def greedy(*arguments):
        torch.empty(2**48)

    monkeypatch.setattr(Slots, "decode", greedy)
    with pytest.raises(UserError, match=r"out of memory .* lower regenerate\.batch_size \(now 4\)"):
        regenerate.run(exact, tmp_path / "run")


def test_another_seed_has_other_documents_answered(exact, tmp_path):
    found = set()
    for rule, seed in [("typical", 0), ("typical", 1), ("greedy", 0), ("greedy", 1)]:
        exact.decode.rule, exact.seed = rule, seed
        exact.regenerate.num_documents = 4
        regenerate.run(exact, tmp_path / "run")
        found.add((tmp_path / "run" / regenerate.RECORD).read_text())
    assert len(found) == 2  # typical, which is lossy, is greedy here


def test_no_room_for_any_answer_is_an_error(exact, tmp_path):
    exact.regenerate.max_new_tokens = 1024
    with pytest.raises(UserError, match=r"lower regenerate\.max_new_tokens"):
        regenerate.run(exact, tmp_path / "run")


def test_other_weights_have_another_identity():
    model = build_model("llama")
    before = Backbone(model).weights_fingerprint()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    assert Backbone(model).weights_fingerprint() != before
    assert Backbone(model).identity() == Backbone(build_model("llama")).identity()


def test_a_command_loads_its_backbone_once(config, tmp_path, monkeypatch):
    config.stages = ["regenerate", "train", "calibrate", "evaluate"]
    config.train = replace(config.train, text="regenerated", val_prompts=2)
    config.dtype.precision = "bf16-mixed"  # in which regenerate runs it, and which it has not
    config.evaluate.num_prompts = config.tree.num_prompts = 2
    config.evaluate.warmup_prompts, config.evaluate.baselines = 0, []
    config.decode.max_new_tokens = config.regenerate.max_new_tokens = 8
    config.run_dir = str(tmp_path)
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def count(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", count)
    run_stages(config, tmp_path, [])
    assert len(loaded) == 1
    fresh = load(config.model.path)
    for mine, theirs in zip(loaded[0][0].parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("changed", [{"kind": "medusa2"}, {"features": "cache"}])
def test_a_backbone_that_is_changed_or_needed_no_more_is_let_go(
    config, tmp_path, monkeypatch, changed
):
    config.train = replace(config.train, max_steps=1, **changed)
    config.decode.max_new_tokens = 8
    if "features" in changed:
        train.run(config, tmp_path)  # notes what the second one needs no layer for
    session = Session(config, tmp_path)
    loaded = weakref.ref(session.backbone(is_adapted=False).model)
    train.run(config, tmp_path, session)
    gc.collect()
    if "kind" not in changed:  # Lightning and peft let go of theirs later
        assert loaded() is None
    fresh = session.backbone(is_adapted=False)
    assert fresh.has_body and fresh.model is not loaded()
    assert not any("lora" in name for name, _ in fresh.model.named_parameters())


def test_responses_under_a_rounded_models_former_name_are_found(config, tmp_path, monkeypatch):
    config.dtype.backbone, config.train.text = "float16", "regenerated"
    config.train.features, config.regenerate = "online", RegenerateConfig(max_new_tokens=6)
    with monkeypatch.context() as earlier:  # versions that named it by its rounded weights
        earlier.setattr("medusa_exp.model.loading._names", lambda spec: None)
        regenerate.run(config, tmp_path / "earlier")
    monkeypatch.setattr(regenerate, "_regenerated", None)
    regenerate.run(config, tmp_path / "now")
    train.run(config, tmp_path / "now")
