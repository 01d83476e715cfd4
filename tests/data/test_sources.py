import json
import re
from collections import Counter

import pytest
from chat_files import parquet

from medusa_exp.config import Config, DatasetConfig, PretrainConfig, SourceConfig
from medusa_exp.data import DataError, read_conversations
from medusa_exp.data.sources import empty_split, files_of, load_split, open_sources, split_of, walk
from medusa_exp.model.source import tiny_dir
from medusa_exp.stages.session import Session


def test_splits_are_disjoint_complete_and_of_the_asked_size():
    dataset = DatasetConfig(val_fraction=0.1, test_fraction=0.2)
    counts = Counter(split_of(f"id-{i}", dataset) for i in range(5000))
    assert counts["test"] == pytest.approx(1000, abs=120)
    assert counts["val"] == pytest.approx(500, abs=100)
    smaller = DatasetConfig(val_fraction=0.1, test_fraction=0.1)
    moved = [i for i in range(500) if split_of(f"id-{i}", smaller) == "test"]
    assert all(split_of(f"id-{i}", dataset) == "test" for i in moved)


def test_load_split(sharegpt_file):
    dataset = DatasetConfig(path=str(sharegpt_file), val_fraction=0.2, test_fraction=0.2)
    sources = open_sources(dataset, "no cache")
    ids = [{c.id for c in load_split(sources, dataset, s)} for s in ("train", "val", "test")]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 40


@pytest.mark.parametrize(
    ("number", "ids", "split", "words"),
    [
        (40, ["x"], "train", r"40 records \(none dropped\)\. All 40 conversations have the id"),
        (40, ["x"], "val", "the id decides the split: give each an id of its own, or leave"),
        (1, ["a"], "val", "One conversation .* add others. .* in val, about 20 are needed"),
        (1, ["x"], "train", "One conversation .* add others. .* in train, about 2 are needed"),
        (
            3,
            ["a", "b", "c"],
            "val",
            "By chance none of 3 .* of about 20: .* or raise dataset",
        ),
        (0, [], "val", r"0 records \(none dropped\)\. Check the file, or raise dataset"),
    ],
)
def test_an_empty_split_says_what_can_help(number, ids, split, words):
    found = {"a": {"records": number, "dropped": {}}}
    dataset = DatasetConfig(val_fraction=0.05, test_fraction=0.05)
    error = str(empty_split(split, found, {*ids}, dataset))
    assert re.search(words, error), error


def test_the_ids_are_those_of_all_that_was_read(tmp_path, tokenizer):
    path = tmp_path / "same.json"
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    path.write_text(json.dumps([{"id": "x", "conversations": turns}] * 3))
    config = Config(cache_dir=str(tmp_path / "cache"))
    config.dataset = DatasetConfig(path=str(path), deduplicate=False)
    said = "All 3 conversations have the id 'x'"
    with pytest.raises(DataError, match=said):
        load_split(open_sources(config.dataset, "no cache"), config.dataset, "val")
    with pytest.raises(DataError, match=said):
        Session(config, tmp_path).tokenized(tokenizer, 100).split("val")


def test_no_assistant_turn_at_all(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "?"}]}] * 3))
    dataset = DatasetConfig(path=str(path))
    with pytest.raises(
        DataError, match=r"split train: sharegpt: 3 records \(no assistant turn: 3\)"
    ):
        load_split(open_sources(dataset, "no cache"), dataset, "train")


def test_no_path():
    with pytest.raises(DataError, match=r"dataset\.path is not set"):
        open_sources(DatasetConfig(), "no cache")


def test_a_generated_data_set_is_written_once_and_read_by_the_same_reader(tmp_path):
    dataset = DatasetConfig(kind="synthetic", num_conversations=20)
    (path,) = files_of(open_sources(dataset, tmp_path))
    written = path.stat().st_mtime_ns
    assert (
        files_of(open_sources(dataset, tmp_path)) == [path] and path.stat().st_mtime_ns == written
    )
    reading = read_conversations(path)
    assert len(list(reading)) == 20 and not reading.dropped
    dataset.seed = 1
    assert files_of(open_sources(dataset, tmp_path)) != [path]


def test_several_sources(sharegpt_file, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(sharegpt_file.read_text().replace("sums-", "more-").replace("1?", "one?"))
    sources = {"a": SourceConfig(str(sharegpt_file)), "b": SourceConfig(str(other), weight=0.5)}
    dataset = DatasetConfig(sources=sources)
    opened = open_sources(dataset, "no cache")
    assert files_of(opened) == [sharegpt_file, other]
    found = [(name, c.id) for name, c in walk(opened)]
    assert found == [("a", f"sums-{i}") for i in range(40)] + [
        ("b", f"more-{i}") for i in range(40)
    ]
    dataset.path = str(other)
    with pytest.raises(DataError, match="both set"):
        open_sources(dataset, "no cache")


@pytest.mark.parametrize("role", ["system", "reasoning"])
@pytest.mark.parametrize("kind", ["lines", "table"])
def test_a_column_that_no_record_has_is_named(tmp_path, role, kind):
    paths = [tmp_path / name for name in ("with", "without")]
    records = [{"q": "Hi", "a": "Hello", "n": {"systems": None}}, {"q": "Hi", "a": "Ho"}]
    for path, record in zip(paths, records, strict=True):
        path.write_bytes(parquet([record]) if kind == "table" else json.dumps(record).encode())
    dataset = DatasetConfig(sources={path.name: SourceConfig(path=str(path)) for path in paths})
    dataset.columns = {"user": "q", "assistant": "a", role: "n.system"}
    with pytest.raises(DataError, match=r"columns names what is not there: n\.system"):
        list(walk(open_sources(dataset, "no cache")))
    dataset.columns[role] = "systems"
    with pytest.raises(DataError, match="what is not there: systems"):
        list(walk(open_sources(dataset, "no cache")))
    dataset.columns[role] = "n.systems"
    assert len(list(walk(open_sources(dataset, "no cache")))) == 2
    dataset.columns[role] = "A"
    with pytest.raises(DataError, match=r"what is not there: A \(did you mean a\?\)"):
        list(walk(open_sources(dataset, "no cache")))


def test_a_conversation_in_two_sources_is_taken_once(sharegpt_file, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_text(sharegpt_file.read_text().replace("sums-", "copied-"))
    sources = {"a": SourceConfig(str(sharegpt_file)), "b": SourceConfig(str(copy))}
    opened = open_sources(DatasetConfig(sources=sources), "no cache")
    assert {name for name, _ in walk(opened)} == {"a"}
    assert opened[1].reading.dropped == {"duplicate": 40}


def test_how_records_are_read_is_in_the_keys_of_what_is_made_of_them(sharegpt_file, tmp_path):
    """But only where it is set: what was cached before these keys keeps its name."""
    names = set()
    for options in ({}, {"form": "messages"}, {"columns": {"messages": "conversations"}}):
        dataset = DatasetConfig(path=str(sharegpt_file), **options)
        [source] = open_sources(dataset, tmp_path)
        *_, read_as = source.identity()
        assert options.items() <= read_as.items()
        assert ("form" in read_as, "columns" in read_as) == (
            "form" in options,
            "columns" in options,
        )
        made_of = {"vocab_size": 300, "seed": 0, "cache_dir": tmp_path}
        names.add(tiny_dir(files_of([source]), dataset, PretrainConfig(), **made_of).name)
    assert len(names) == 3
