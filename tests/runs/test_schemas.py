"""Malformed files of a run directory: each is one clear message, or counts as missing."""

import json
import os
from collections.abc import Callable

import pytest
from report_pages import FILES

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.runs import record
from medusa_exp.runs.compare import compare
from medusa_exp.runs.files import read_json, read_jsonl
from medusa_exp.runs.jobs import read_jobs
from medusa_exp.runs.record import RunRecord
from medusa_exp.runs.schemas import SCHEMAS
from medusa_exp.tracking.run_report import _content
from medusa_exp.tree import Tree

GOOD = {
    **FILES,
    "history.jsonl": FILES["history.jsonl"][:2],
    "job.json": {"number": 0, "overrides": ["a=1"], "objective": "x", "status": "done", "value": 1},
    "failure.json": {"error": "E: x"},
    "data.json": {
        "key": "0c",
        "sources": {"a": {"records": 3, "dropped": {"x": 1}, "kept records": 2}},
        "examples": {},
        "notes": [],
    },
    "data_samples.jsonl": [{"source": "a", "text": "b"}],
    "serving.json": {"heads": {"url": "http://x", "model": "m", "fingerprint": None}},
    "regenerated.json": {
        "key": "0c",
        "documents": 1,
        "answers": 2,
        "tokens": 3,
        "unfinished": [],
        "no_room": ["a"],
    },
    "sha256.json": {"files": {"a": {"bytes": 1, "sha256": "0" * 64, "ends": "f" * 64}}},
    "tokenizer_source.json": {"versions": {"a": "1"}, "backend_sha256": "0"},
}
MISSING = (b"", b"\0" * 40)
"""What lost power leaves under a name: such a file counts as missing."""


def _lines(name: str) -> list[object]:
    return GOOD[name] if name.endswith(".jsonl") else [GOOD[name]]


def _text(values: list[object]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _wrong_types(value: object) -> list[object]:
    """Return a value with each of its members, a level deep, in another type."""
    if not isinstance(value, dict):
        return []
    wrong = [{**value, name: member} for name in value for member in ({"x": [[]]}, [{"x": 1e309}])]
    return [[value], None, 7, "x", True, *wrong]


def _malformed(name: str) -> list[bytes]:
    first, text = _lines(name)[0], _text(_lines(name))
    return [
        text[:-1].rstrip(b"}") + b"\n",
        b'{"a": NaN}\n',
        b"\xff\xfe" + text,
        b"[" * 100_000 + b"\n",
        b'{"a": ' + b"9" * 5000 + b"}\n",
        b"hello\n",
        text.replace(b'"', b"'"),
        *(_text([one]) for one in _wrong_types(first)),
    ]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_malformed_file_is_named_with_what_to_do(name, tmp_path):
    path, read = tmp_path / name, read_jsonl if name.endswith(".jsonl") else read_json
    path.write_bytes(_text(_lines(name)))
    assert read(path) == (_lines(name) if read is read_jsonl else _lines(name)[0])
    messages = []
    for content in _malformed(name):
        path.write_bytes(content)
        messages += _message_of(lambda: read(path))
    assert len(messages) >= 11, "what is let through are keys that nobody reads"
    for message in messages:
        assert str(path) in message and "\n" not in message
        assert SCHEMAS[name].remedy[1:] in message
    for content in MISSING:
        path.write_bytes(content)
        assert not read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"{name} is no file"):
        read(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name} is no file"):
        read(path)


def _message_of(read: Callable[[], object]) -> list[str]:
    """Return the message that it ends with, if it does; any other error is one."""
    try:
        read()
    except UserError as error:
        return [str(error)]
    return []


READERS = [
    (lambda out: RunRecord(out, Config(device="cpu"), []), ["run.json", "metrics.json"]),
    (_content, sorted(set(FILES) - {"run.json", "metrics.json", "tree.json"})),
    (lambda out: compare(out, out), ["metrics.json", "tree.json", "run.json", "data.json"]),
    (lambda out: Tree.load(out / "tree.json"), ["tree.json"]),
    (lambda out: read_jobs(out.parent), ["job.json"]),
]
"""What reads a run, and which files of it."""


@pytest.mark.parametrize(("reader", "names"), READERS)
def test_no_reader_of_a_run_fails_but_with_a_message(reader, names, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "checkout", lambda: ({}, ""))
    out = tmp_path / "run"
    out.mkdir()
    for other in GOOD:
        (out / other).write_bytes(_text(_lines(other)))
    reader(out)
    for name in names:
        first = _lines(name)[0]
        without = [{key: first[key] for key in first if key != left_out} for left_out in first]
        # Of a whole page, which takes its time, what the other readers do not try.
        malformed = [] if reader is _content else [*_malformed(name), *MISSING]
        for content in [*malformed, *(_text([one]) for one in without)]:
            (out / name).write_bytes(content)
            assert all(name in message for message in _message_of(lambda: reader(out)))
        (out / name).write_bytes(_text(_lines(name)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.update(tree="deep"),
        lambda found: found["curve"][0].update(tree={"parents": [0], "ranks": [0]}),
        lambda found: found["curve"][0].update(step_seconds=0),
        lambda found: found["batch_sizes"][0].update(plain_step_seconds=0),
        lambda found: found["batch_sizes"][0].update(curve=[{}]),
    ],
    ids=["tree", "tree of a point", "step", "plain step", "point"],
)
def test_a_calibration_of_senseless_parts_is_refused(damage, tmp_path):
    found = json.loads(json.dumps(GOOD["calibration.json"]))
    damage(found)
    (tmp_path / "calibration.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="run stage calibrate again"):
        read_json(tmp_path / "calibration.json")


@pytest.mark.parametrize(
    "content",
    [
        '{"parents": [-1, 0.5], "ranks": [-1, 0]}',
        '{"parents": [-1, 0], "ranks": [-1, 99999999999]}',
        '{"parents": [-1, 1], "ranks": [-1, 0]}',
        '{"parents": [-1], "ranks": [-1], "num_lookup": 1e9}',
        '{"paths": [[0], "x"]}',
        '{"paths": {}}',
        "[[0, 0]]",
        "[[-3]]",
        "[[0], [1e30]]",
        "7",
        '"paths"',
        "null",
        f"[{', '.join(['[0]'] * 9999)}]",
    ],
)
def test_a_file_that_is_no_tree_is_refused(content, tmp_path):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=r"mine\.json (holds no tree|does not exist)"):
        Tree.load(tmp_path / "mine.json")
