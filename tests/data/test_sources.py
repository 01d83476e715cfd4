import json
from collections import Counter

import pytest

from medusa_exp.config import Config, DatasetConfig
from medusa_exp.data import DataError, read_conversations
from medusa_exp.data.sources import dataset_files, load_split, split_of, tokenise


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
    ids = [{c.id for c in load_split(Config(dataset=dataset), s)} for s in ("train", "val", "test")]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 40


def test_an_empty_split_says_what_to_raise(sharegpt_file):
    config = Config(dataset=DatasetConfig(path=str(sharegpt_file), val_fraction=0.0))
    with pytest.raises(DataError, match=r"no conversation for split val .* dataset.val_fraction"):
        load_split(config, "val")


def test_no_assistant_turn_at_all(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "?"}]}] * 3))
    with pytest.raises(DataError, match=r"questions.json.*no assistant turn: 3"):
        load_split(Config(dataset=DatasetConfig(path=str(path))), "train")


def test_no_path():
    with pytest.raises(DataError, match=r"dataset\.path is not set"):
        dataset_files(Config())


def test_a_generated_data_set_is_written_once_and_read_by_the_same_reader(tmp_path):
    dataset = DatasetConfig(kind="synthetic", num_conversations=20)
    config = Config(dataset=dataset, cache_dir=str(tmp_path))
    (path,) = dataset_files(config)
    written = path.stat().st_mtime_ns
    assert dataset_files(config) == [path] and path.stat().st_mtime_ns == written
    reading = read_conversations(path)
    assert len(list(reading)) == 20 and not reading.dropped
    dataset.seed = 1
    assert dataset_files(config) != [path]


def test_tokenise_counts_what_it_cuts_and_drops(sharegpt_file, tokenizer, caplog):
    conversations = list(read_conversations(sharegpt_file))
    whole = tokenise(conversations, tokenizer, 100)
    assert len(whole) == 40 and all(s.is_trained.any() for s in whole)
    caplog.clear()
    cut = tokenise(conversations, tokenizer, 22)
    assert {len(s.input_ids) for s in cut} == {22}
    assert "cut to 22 tokens: 40" in caplog.text
    for sequence, original in zip(cut, whole, strict=True):
        assert sequence.is_trained.tolist() == original.is_trained[:22].tolist()
    with pytest.raises(DataError, match="no assistant token left: 40"):
        tokenise(conversations, tokenizer, 5)


def test_tokenise_counts_what_the_template_refuses(sharegpt_file, tokenizer, caplog):
    tokenizer.chat_template = (
        "{% if '7' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}"
        + tokenizer.chat_template
    )
    conversations = list(read_conversations(sharegpt_file))
    sequences = tokenise(conversations, tokenizer, 100)
    assert len(sequences) == 36  # not 7, 17, 27, 37
    assert "refused by the chat template: 4" in caplog.text
    assert "no sevens" in caplog.text
