"""Regenerated responses that versions before FORMAT 3 have left in the cache, as an Arrow file."""

import sys
from pathlib import Path

import pyarrow as pa
import pytest

from medusa_exp.config import DatasetConfig
from medusa_exp.data import DataError
from medusa_exp.errors import UserError
from medusa_exp.runs.files import write_json
from medusa_exp.train.regenerated import open_regenerated

SCHEMA = pa.schema(
    {
        "input_ids": pa.large_list(pa.int32()),
        "is_trained": pa.large_list(pa.uint8()),
        "conversation_id": pa.string(),
        "source": pa.string(),
    }
)
LENGTHS = [3, 9, 4, 70, 5]


@pytest.fixture
def old(tmp_path) -> Path:
    """Return the file of such an entry, which was written in two parts."""
    path = tmp_path / "regenerated" / "key" / "documents.arrow"
    path.parent.mkdir(parents=True)
    write_json(
        path.parent / "summary.json",
        {"documents": 5, "answers": 5, "tokens": 91, "unfinished": [], "no_room": []},
    )
    columns = {
        "input_ids": [list(range(n)) for n in LENGTHS],
        "is_trained": [[0] + [1] * (n - 1) for n in LENGTHS],
        "conversation_id": [f"caf\u00e9-{n}" for n in LENGTHS],
        "source": ["s"] * 5,
    }
    with pa.ipc.new_file(str(path), SCHEMA) as file:
        for place in (slice(0, 2), slice(2, 5)):
            part = {name: values[place] for name, values in columns.items()}
            file.write_batch(pa.RecordBatch.from_pydict(part, SCHEMA))
    return path


def test_old_responses_are_read(old, tmp_path):
    dataset = DatasetConfig(val_fraction=0.0, test_fraction=0.0)
    found = open_regenerated(str(tmp_path), "key", dataset)
    assert found.keys() == {"train"} and found["train"].lengths.tolist() == LENGTHS
    for length, example in zip(LENGTHS, found["train"], strict=True):
        assert example.input_ids.tolist() == list(range(length))
        assert example.is_trained.tolist() == [False] + [True] * (length - 1)
    assert found["train"].strings("conversation_id") == [f"caf\u00e9-{n}" for n in LENGTHS]


def test_old_responses_need_pyarrow(old, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"documents\.arrow, .* pip install 'medusa-exp\[parquet\]'"
    ):
        open_regenerated(str(tmp_path), "key", DatasetConfig())


def test_damaged_old_responses_are_refused(old, tmp_path):
    content = old.read_bytes()
    for damage in (content[:-40], content[:100], b"", b"ARROW1" + content[20:]):
        old.write_bytes(damage)
        with pytest.raises(UserError, match="run stage regenerate again"):
            open_regenerated(str(tmp_path), "key", DatasetConfig())


def test_old_responses_without_a_mark_of_every_token_are_refused(old, tmp_path):
    row = {"input_ids": [[1, 2]], "is_trained": [[1]], "conversation_id": ["a"], "source": ["s"]}
    with pa.ipc.new_file(str(old), SCHEMA) as file:
        file.write_batch(pa.RecordBatch.from_pydict(row, SCHEMA))
    with pytest.raises(UserError, match="not a mark of every token"):
        open_regenerated(str(tmp_path), "key", DatasetConfig())
