import json
import sys

import pytest

from medusa_exp.data import DataError, Message, read_conversations

RECORD = {
    "id": "a-1",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
}


def chat(record_id, *contents, system=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": c} for i, c in enumerate(contents)]
    return {"id": record_id, "conversations": turns, "system": system}


def write_list(path, records):
    path.write_text(json.dumps(records))
    return path


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    return path


def ids(path, **options):
    return [conversation.id for conversation in read_conversations(path, **options)]


def test_every_iteration_reads_and_counts_anew(tmp_path):
    bad = [{"id": "x"}, {"conversations": []}, {"id": "y"}, "text"]
    path = write_list(tmp_path / "a.json", [RECORD, *bad])
    reading = read_conversations(path)
    assert reading.paths == [path] and reading.num_records == 0
    for _ in range(2):
        (found,) = reading
        assert found.messages == [Message("user", "Hi"), Message("assistant", "Hello!")]
        assert reading.num_records == 5
        assert reading.dropped == {
            "no known form of chat": 2,
            "no turns": 1,
            "not a JSON object": 1,
        }


def test_several_places(tmp_path):
    (tmp_path / "sub").mkdir()
    first = write_list(tmp_path / "a.json", [chat("a", "x", "y")])
    second = write_lines(tmp_path / "sub" / "b.jsonl", [chat("b", "x", "y")])
    assert ids([str(first), tmp_path / "sub", f"{tmp_path}/*.json"]) == ["a", "b"]
    assert read_conversations([second, tmp_path]).paths == [second, first]
    with pytest.raises(DataError, match="there is no such file"):
        read_conversations([first, tmp_path / "no.json"])


SIZES = [
    chat("two", "12", "34"),
    chat("three", "123", "4", "5", system="12345"),
    chat("four", "1", "2", "3", "4"),
]


@pytest.mark.parametrize(
    ("options", "kept", "dropped"),
    [
        ({}, "two three four", {}),
        ({"min_turns": 3}, "three four", {"too few turns": 1}),
        ({"max_turns": 3}, "two three", {"too many turns": 1}),
        ({"min_chars": 10}, "three", {"too short": 2}),
        ({"max_chars": 4}, "two four", {"too long": 1}),
        ({"min_turns": 4, "max_chars": 3}, "", {"too few turns": 2, "too long": 1}),
        ({"sample_fraction": 0}, "", {"not sampled": 3}),
    ],
)
def test_size_limits(tmp_path, options, kept, dropped):
    reading = read_conversations(write_list(tmp_path / "a.json", SIZES), **options)
    assert [c.id for c in reading] == kept.split()
    assert reading.dropped == dropped and reading.num_records == 3


def test_duplicates_are_of_all_files_and_of_what_is_kept(tmp_path):
    records = [chat("a", "x", "y"), chat("b", "x", "y", system="s"), chat("c", "x", "y")]
    paths = [write_list(tmp_path / "a.json", records), write_lines(tmp_path / "b.json", records)]
    assert len(ids(paths)) == 6
    reading = read_conversations(paths, deduplicate=True)
    for _ in range(2):  # nothing is remembered from one walk to the next
        assert [c.id for c in reading] == ["a", "b"] and reading.dropped == {"duplicate": 4}
    reading = read_conversations(paths, deduplicate=True, min_chars=3)
    assert [c.id for c in reading] == ["b"]
    assert reading.dropped == {"too short": 4, "duplicate": 1}


def test_a_sample_depends_on_ids_and_seed_alone(tmp_path):
    records = [chat(f"r-{i}", "x", "y") for i in range(2000)]
    path = write_lines(tmp_path / "a.json", records)
    sample = ids(path, sample_fraction=0.25)
    assert 400 < len(sample) < 600
    turned = write_list(tmp_path / "b.json", records[::-1])
    assert ids(turned, sample_fraction=0.25) == sample[::-1]
    assert set(sample) < set(ids(path, sample_fraction=0.5))
    assert ids(path, sample_fraction=0.25, seed=1) != sample
    assert ids(path, sample_fraction=1.0) == [record["id"] for record in records]


@pytest.mark.parametrize(
    ("write", "place"), [(write_list, r"record 3: "), (write_lines, r"record 3 \(line 5\): ")]
)
def test_strict(tmp_path, write, place):
    good, short = chat("a", "xx", "y"), chat("b", "x", "y")
    path = write(tmp_path / "a.json", [good, short, chat("c", "x"), good, chat("d")])
    with pytest.raises(DataError, match=rf"a\.json, {place}no assistant turn"):
        ids(path, strict=True, min_chars=3)
    path = write(tmp_path / "a.json", [good, short, good])
    assert ids(path, strict=True, min_chars=3, deduplicate=True) == ["a"]  # no faults, but choices


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_as_from_the_hub(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    records = [chat(f"r-{i}", "x", "y", system="s") for i in range(300)]
    write_lines(folder / "train.jsonl", [*records, chat("bad", "x")])
    reading = read_conversations(f"hub:{folder}")
    assert [c.id for c in reading] == [f"r-{i}" for i in range(300)]
    assert next(iter(reading)).messages[0] == Message("system", "s")
    assert reading.paths == [] and len(list(reading)) == 300
    assert reading.dropped == {"no assistant turn": 1} and reading.num_records == 301
    with pytest.raises(DataError, match=r"hub:.*, split test, .* dataset\.hub_split"):
        ids(f"hub:{folder}", hub_split="test")
    with pytest.raises(DataError, match=r"hub:.*data, record 301: no assistant turn"):
        ids(f"hub:{folder}", strict=True)


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_data_set_without_chats(tmp_path):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"no known form of chat: its columns are text"):
        ids(f"hub:{tmp_path}/data")


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'medusa-exp\[hub\]'"):
        ids("hub:owner/name")
