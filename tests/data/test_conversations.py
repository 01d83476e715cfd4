import json

import pytest

from medusa_exp.data import DataError, Message, read_conversations

RECORD = {
    "id": "a-1",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_roles_and_contents(tmp_path):
    record = {
        "id": 7,
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "  Hi\r\n"},
            {"from": "assistant", "value": "\u00fc\u0000"},
        ],
        "extra": [1, None],
    }
    (conversation,) = read_conversations(write(tmp_path / "a.json", json.dumps([record])))
    assert conversation.id == "7"
    assert conversation.messages == [
        Message("system", "Be brief."),
        Message("user", "  Hi\r\n"),
        Message("assistant", "\u00fc\u0000"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([RECORD, RECORD]),
        f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n",
        b"\xef\xbb\xbf" + json.dumps([RECORD, RECORD]).encode(),
    ],
    ids=["list", "lines", "byte-order mark"],
)
def test_forms_are_told_apart_by_content(tmp_path, text):
    reading = read_conversations(write(tmp_path / "a.json", text))
    assert len(list(reading)) == 2 and reading.num_records == 2 and not reading.dropped


def test_files_folders_and_globs(tmp_path):
    for name in ("a.json", "sub/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, json.dumps(RECORD) + "\n")
    write(tmp_path / "c.txt", "not chat")
    assert len(list(read_conversations(tmp_path))) == 2
    assert len(list(read_conversations(f"{tmp_path}/*.json"))) == 1
    assert len(list(read_conversations([tmp_path / "a.json", tmp_path / "sub"]))) == 2


def test_what_cannot_be_used_is_counted_by_reason(tmp_path):
    bad = [
        {"id": "x"},
        {"conversations": "text"},
        {"conversations": []},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "  "}]},
    ]
    reading = read_conversations(write(tmp_path / "a.json", json.dumps([RECORD, *bad])))
    assert [c.id for c in reading] == ["a-1"]
    assert reading.num_records == 8
    assert reading.dropped == {
        "not a ShareGPT record": 3,
        "no turns": 1,
        "unknown role": 1,
        "no assistant turn": 2,
    }
    assert len(list(reading)) == 1 and reading.num_records == 8  # counts are of one walk


def test_a_record_without_id_is_named_by_its_content(tmp_path):
    nameless = {"conversations": RECORD["conversations"]}
    path = write(tmp_path / "a.json", json.dumps([nameless]))
    (first,), (again,) = read_conversations(path), read_conversations(path)
    assert first.id == again.id and first.id.startswith("sha256-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('[{"id": "a",}]', r"is not valid JSON: .* line 1, column 13"),
        ('[{"id":\n "a"', "is not valid JSON"),
        ('{"a": 1}', "holds one JSON value"),
        ("hello", "is not valid JSON"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, text, message):
    path = write(tmp_path / "bad.json", text)
    with pytest.raises(DataError, match=message) as caught:
        list(read_conversations(path))
    assert str(path) in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        read_conversations(tmp_path / "no.json")
    with pytest.raises(DataError, match=r"holds no \*.json"):
        read_conversations(tmp_path)
