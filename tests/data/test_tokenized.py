import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from chat_files import conversation_record
from sessions import rows_of, session_of

from medusa_exp.config import Config, DatasetConfig, SourceConfig
from medusa_exp.data import DataError, read_conversations, render, tokenized
from medusa_exp.data.examples import Table, Writer, open_examples
from medusa_exp.errors import UserError
from medusa_exp.runs.files import sha256_file, write_json
from medusa_exp.runs.record import RunRecord
from medusa_exp.stages.session import Session


@pytest.fixture
def config(sharegpt_file, tmp_path) -> Config:
    dataset = DatasetConfig(path=str(sharegpt_file), val_fraction=0.2, test_fraction=0.2)
    return Config(dataset=dataset, cache_dir=str(tmp_path / "cache"))


def documents(data):
    found = {}
    for split in ("train", "val", "test"):
        examples = data.split(split)
        for name, example in zip(examples.strings("conversation_id"), examples, strict=True):
            found[name] = (example.input_ids.tolist(), example.is_trained.tolist())
    return found


def test_documents_are_what_rendering_gives(config, tokenizer, sharegpt_file):
    data = session_of(config).tokenized(tokenizer, 100)
    expected = {}
    for conversation in read_conversations(sharegpt_file):
        (row,) = render(conversation, tokenizer)
        expected[conversation.id] = (row.input_ids, row.is_trained)
    assert documents(data) == expected
    outcomes = data.summary["sources"]["sharegpt"]
    assert outcomes["records"] == outcomes["kept records"] == outcomes["documents"] == 40
    assert outcomes["tokens"] == sum(len(ids) for ids, _ in expected.values())
    assert outcomes["trained tokens"] == sum(sum(mask) for _, mask in expected.values())


@pytest.mark.parametrize("side", ["right", "left"])
def test_cutting_keeps_whole_tokens_and_counts(config, tokenizer, side, caplog):
    whole = documents(session_of(config).tokenized(tokenizer, 100))
    tokenizer.truncation_side = side
    data = session_of(config).tokenized(tokenizer, 22)
    window = slice(-22, None) if side == "left" else slice(22)
    cut = {name: (ids[window], mask[window]) for name, (ids, mask) in whole.items()}
    assert documents(data) == cut
    data.log()
    assert "40 chats were longer than 22 tokens" in caplog.text


def test_what_is_left_without_a_trained_token_is_counted(config, tokenizer, tmp_path):
    long = {"id": "long", "conversations": conversation_record(0)["conversations"]}
    long["conversations"][0]["value"] = "x" * 90
    path = tmp_path / "long.json"
    path.write_text(json.dumps([long, *(conversation_record(i) for i in range(3, 30))]))
    config.dataset.path = str(path)
    outcomes = session_of(config).tokenized(tokenizer, 50).summary["sources"]["sharegpt"]
    assert outcomes["dropped"] == {"no assistant token left": 1}
    assert outcomes["records"] == outcomes["kept records"] + 1 == 28
    with pytest.raises(
        DataError, match=r"28 records; 28 of 28 were cut .*conversation long .* needs 95 tokens"
    ):
        session_of(config).tokenized(tokenizer, 8)


def test_what_the_template_refuses_is_counted(config, tokenizer, caplog):
    tokenizer.chat_template = (
        "{% if '7' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}"
        + tokenizer.chat_template
    )
    data = session_of(config).tokenized(tokenizer, 100)
    assert data.summary["sources"]["sharegpt"]["dropped"] == {"refused by the chat template": 4}
    data.log()
    assert "refused by the chat template: 4" in caplog.text and "no sevens" in caplog.text


def test_a_second_start_reads_the_cache(config, tokenizer, monkeypatch, caplog):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content }}{{ '!' if loop.last }}"
    )
    first = session_of(config).tokenized(tokenizer, 100)
    expected = documents(first)
    monkeypatch.setattr(tokenized, "_build", None)
    again = session_of(config).tokenized(tokenizer, 100)
    assert documents(again) == expected and (first.is_new, again.is_new) == (True, False)


@pytest.mark.parametrize(
    "change",
    ["text", "template", "length", "side", "options"],
)
def test_what_decides_the_documents_decides_the_entry(config, tokenizer, change, sharegpt_file):
    length = 100
    first = session_of(config).tokenized(tokenizer, length).summary["key"]
    if change == "text":
        sharegpt_file.write_text(sharegpt_file.read_text().replace("What", "Who"))
    elif change == "template":
        tokenizer.chat_template += " "
    elif change == "length":
        length = 99
    elif change == "side":
        tokenizer.truncation_side = "left"
    else:
        config.dataset.min_turns = 2
    assert session_of(config).tokenized(tokenizer, length).summary["key"] != first


def test_weights_are_of_the_source_and_of_training_alone(config, tokenizer, tmp_path):
    paths = {}
    for name in ("a", "b"):
        paths[name] = tmp_path / f"{name}.json"
        records = [conversation_record(i) for i in range(30)]
        for record in records:
            record["id"] += name
            record["conversations"][0]["value"] += name
        paths[name].write_text(json.dumps(records))
    config.dataset.path = None
    config.dataset.sources = {
        "a": SourceConfig(str(paths["a"]), 2.0),
        "b": SourceConfig(str(paths["b"]), 0.5),
    }
    data = session_of(config).tokenized(tokenizer, 100)
    train = data.split("train")
    assert {*zip(train.strings("source"), train.weights.tolist(), strict=True)} == {
        ("a", 2.0),
        ("b", 0.5),
    }
    assert (data.split("val").weights == 1).all()
    key = data.summary["key"]
    config.dataset.sources["b"].weight = 3.0
    assert session_of(config).tokenized(tokenizer, 100).summary["key"] == key


def test_cutting_on_the_left_keeps_bos(config, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.truncation_side = "left"
    ids = session_of(config).tokenized(tokenizer, 22).split("train")[0].input_ids.tolist()
    whole = session_of(config).tokenized(tokenizer, 100).split("train")[0].input_ids.tolist()
    assert ids == [tokenizer.bos_token_id, *whole[-21:]]


def test_strict_holds_for_the_template_too(config, tokenizer):
    tokenizer.chat_template = (
        "{% if '7' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}"
        + tokenizer.chat_template
    )
    config.dataset.strict = True
    with pytest.raises(
        DataError, match=r"conversation sums-7 \(.*chat\.json, record 8\): .*no sevens"
    ):
        session_of(config).tokenized(tokenizer, 100)


def test_turns_beyond_the_limit_are_counted_where_each_is_a_row(config, tokenizer, sharegpt_file):
    records = json.loads(sharegpt_file.read_text())
    for record in records:
        record["conversations"] *= 4
    sharegpt_file.write_text(json.dumps(records))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "{{ loop.last }}<|end|>")
    outcomes = session_of(config).tokenized(tokenizer, 110).summary["sources"]["sharegpt"]
    assert outcomes["kept records"] == 40
    lost = outcomes["assistant turns beyond the length limit"]
    assert lost > 40 and outcomes["documents"] + lost == 160


@pytest.mark.parametrize("lost", ["documents/input_ids.npy", "summary.json", "*"])
def test_an_entry_that_lost_files_and_its_seal_is_built_again(config, tokenizer, lost):
    """As what clears old files away leaves it."""
    expected = documents(session_of(config).tokenized(tokenizer, 100))
    (entry,) = (path for path in Path(config.cache_dir).glob("tokenised/*") if path.is_dir())
    for file in [entry / "sha256.json", *entry.rglob(lost)]:
        if file.is_file():
            file.unlink()
    again = session_of(config).tokenized(tokenizer, 100)
    assert again.is_new and documents(again) == expected


def test_a_cache_that_cannot_be_written(config, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"could not be written under cache_dir="):
        session_of(config).tokenized(tokenizer, 100)


def test_documents_whose_writing_failed_are_not_opened(tmp_path):
    with suppress(KeyboardInterrupt), Writer(tmp_path / "documents") as file:
        file.write(Table.of([([1, 2], [False, True], "a", "s")]))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="is cut off, or no array of"):
        open_examples(tmp_path / "documents")


def test_several_processes_give_the_same_file_in_the_same_order(config, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenized, "_CHUNK", 4)
    config.dataset.num_workers = 1
    serial = session_of(config).tokenized(tokenizer, 100)
    monkeypatch.setattr(tokenized, "_SERIAL_CHUNKS", 3)
    config.dataset.num_workers = 2
    config.cache_dir += "-2"
    parallel = session_of(config).tokenized(tokenizer, 100)
    assert parallel.is_new and parallel.summary == serial.summary
    assert rows_of(parallel.table) == rows_of(serial.table)


def test_notes_of_workers_are_logged(config, tokenizer, monkeypatch, caplog, sharegpt_file):
    monkeypatch.setattr(tokenized, "_CHUNK", 4)
    monkeypatch.setattr(tokenized, "_SERIAL_CHUNKS", 3)
    config.dataset.num_workers = 2
    tokenizer.chat_template += "{% if not add_generation_prompt %}<|end|>{% endif %}"
    records = json.loads(sharegpt_file.read_text())
    for record in records:
        record["conversations"] *= 2
    sharegpt_file.write_text(json.dumps(records))
    data = session_of(config).tokenized(tokenizer, 200)
    assert caplog.text.count("row of its own") == 1
    assert data.summary["sources"]["sharegpt"]["documents"] == 80
    caplog.clear()
    session_of(config).tokenized(tokenizer, 200).log()
    assert caplog.text.count("row of its own") == 1


def test_an_empty_split_says_what_to_raise(config, tokenizer):
    config.dataset.val_fraction = 0.0
    data = session_of(config).tokenized(tokenizer, 100)
    with pytest.raises(DataError, match=r"split val: .*raise dataset\.val_fraction"):
        data.split("val")
    assert len(data.split("train")) + len(data.split("test")) == 40
    assert np.all(data.split("train").weights == 1)


@pytest.mark.parametrize("is_same", [True, False])
def test_an_older_key_holds_for_the_same_files_alone(
    config, tokenizer, sharegpt_file, tmp_path, is_same
):
    """A run from before formats had numbers is known by its key, not one of other data."""
    out = tmp_path / "run"
    out.mkdir()
    config.run_dir = str(out)
    sources = Session(config, out).tokenized(tokenizer, 100).summary["sources"]
    write_json(out / "data.json", {"key": "older", "sources": sources})
    write_json(out / "run.json", {"data": {"a": sha256_file(sharegpt_file), "b": "0"}})
    session = Session(config, out)
    if not is_same:  # the same chats in another order: all counts are equal
        config.dataset.path = str(tmp_path / "other.json")
        chats = json.loads(sharegpt_file.read_text())
        Path(config.dataset.path).write_text(json.dumps(chats[::-1]))
    with RunRecord(out, config, []).stage("train") as session.notes:  # notes what it opens
        found = session.tokenized(tokenizer, 100).summary
    assert (found["key"] == "older") == is_same
    assert ("format" in found) != is_same


def test_what_is_cut_before_the_first_reply_says_how_long_it_must_be(config, tokenizer):
    tokenizer.chat_template = "{{ 'be brief ' * 60 }}" + tokenizer.chat_template
    needed = 0
    for max_length in (120, 130):
        with pytest.raises(DataError) as caught:
            session_of(config).tokenized(tokenizer, max_length)
        words = rf"40 of 40 were cut before the first reply, at {max_length} tokens, and the "
        found = re.search(
            rf"{words}shortest needs (\d+)\).*Raise dataset\.max_length", str(caught.value)
        )
        assert found, caught.value
        assert "no assistant token left: 40" not in str(caught.value)
        assert needed in (0, int(found[1]))
        needed = int(found[1])
    with pytest.raises(DataError):
        session_of(config).tokenized(tokenizer, needed - 1)
    session_of(config).tokenized(tokenizer, needed)
    tokenizer.truncation_side = "left"  # what follows the reply is cut last
    session_of(config).tokenized(tokenizer, 120)
