import json
import pickle
import re
import shutil
import subprocess

import pytest
from chat_files import (
    BOM,
    LINES,
    LIST,
    PRETTY,
    RECORDS,
    arrow,
    arrow_stream,
    bzip2,
    gzipped,
    parquet,
    write,
    xz,
    zstd,
)

from medusa_exp.data import DataError, read_conversations


def fault_of(path):
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (BOM + b" \n\n", "is empty"),
        (gzipped(b""), "is empty"),
        (LIST[:-20], r"is cut off: .* line 1, column 581\."),
        (PRETTY[:-1], r"is cut off: .* line 67, column 1\."),
        (PRETTY[:-40], "is cut off: "),
        (b'[{"id": 1', "is cut off"),
        (gzipped(LIST)[:-30], "is cut off in its compressed data"),
        (gzipped(LINES)[:-2], "is cut off in its compressed data"),
        (zstd(LINES)[:-8], "is cut off in its compressed data"),
        (gzipped(LINES)[:-8] + b"checksum", "is damaged"),
        (b'[{"id": "a",}]', r"trailing comma in object: line 1, column 12\."),
        (PRETTY.rstrip(b"\n]") + b",\n \n]\n", r"trailing comma in array: line 66, column 4\."),
        (b'[{"id": "b"},\n {"id": NaN}]', r"invalid character: line 2, column 9\. As JSON Lines"),
        (b'[{"id":\n 1} {}]', r"is not valid JSON: expected ',' or ']': line 2, column 5\."),
        (b'[{"id":\n "a\nb"}]', r"is not valid JSON: invalid character: line 2, column 4\."),
        (b"[{'id': 1}]", r"expected '\"': line 1, column 3\."),
        (b"[1\n]\n[2]\n", r"trailing characters .* `jq -c \.`\): line 3, column 1"),
        (b"[1]\n[2]\n", r"has no chat that can be read: a turn is not .*: it is 1"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{\n "data": [\n  1,,\n', r"is not valid JSON: .* line 3, column 5\."),
        (b'{\n "a": 1\n}\n{\n "a": 2\n}\n', r"`jq -c \.`\): line 4, column 1"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
        (LIST.decode().encode("utf-16"), "probably UTF-16: .*iconv -f UTF-16 -t UTF-8"),
        (LIST.decode().encode("utf-16-le"), "iconv -f UTF-16LE"),
        (LINES.decode().encode("utf-16-be"), "iconv -f UTF-16BE"),
        (LIST.decode().encode("utf-32"), "iconv -f UTF-32 "),
        (LIST.decode().encode("utf-32-be"), "iconv -f UTF-32BE"),
        (LIST.decode().encode("latin-1"), "iconv -f ISO-8859-1 -t UTF-8"),
        (LINES.replace(b"?", "\u2019".encode()).decode().encode("cp1252"), "iconv -f CP1252"),
        (
            b'{"version": 1, "data": [], "test": [{"x": 0}], "n": {}}',
            r"no known form of chat: its keys are x\. .*dataset\.columns",
        ),
        (b'{\n"rows": [\n{}\n]\n}', "its keys are none"),
        (b'{"a": 1}', "its keys are a"),
        (b'{"a": {}, "b": {}}', "its keys are a, b"),
        (b'"chats"', "holds no chats: it has a JSON text where an object should be"),
        (b"NaN\n", "a JSON number where"),
        (b"null", "a JSON null where"),
        (b"[[]]", "a JSON list where"),
        (b'["a"]', "a JSON text where"),
        (b"true\nfalse\n", "a JSON boolean where"),
        (b"hello\nworld", r"is not valid JSON: no line of it is\. Line 1, column 1: "),
        (b'\n{"id": 1 2}\n{"id": }', r"no line of it is\. Line 2, column 10: "),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"\n<html><head>", "is a web page"),
        (parquet(RECORDS)[:-30], "is damaged"),
        (b"PAR1 but not really", "is damaged"),
        (arrow(RECORDS)[:-30], "is damaged"),
        (arrow(RECORDS)[:300] + bytes(500) + arrow(RECORDS)[800:], "is damaged"),
        (arrow_stream(RECORDS)[:-8], "is cut off: it has no mark of its end"),
        (arrow_stream(RECORDS)[:-300] + arrow_stream(RECORDS)[-8:], "is damaged"),
        (arrow([{"text": "x", "n": 1}]), "no known form of chat: its columns are text, n"),
        (parquet([{"text": "x", "n": 1}]), "no known form of chat: its columns are text, n"),
        (b"\x90\x04\x95\n\0\xff\xfe\n\0", "neither text nor a known binary format"),
        (pickle.dumps({"a": 1}), "is a pickle, which may .* never opened: write its chats as JSON"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "is an array of NumPy: "),
        (b'\x40\0\0\0\0\0\0\0{"a":{', "is a safetensors file of weights: dataset.path names"),
        (b"SQLite format 3\0", "is an SQLite database: "),
        (b"%PDF-1.7\n", "is a PDF document: "),
        (b"\x89PNG\r\n", "is a picture: "),
        (b"\0\0\0\x18ftypmp42", "is a sound or a video: "),
        (b"7z\xbc\xaf\x27\x1c", "is an archive of 7z: unpack it"),
        (b"FEA1\0\0", "is a Feather file of version 1, .*: save it as Parquet"),
        (b"[]\n", "holds no record: it is an empty list, or a table without a row"),
        (arrow([{"text": "x"}], is_empty=True), "holds no record"),
        (
            b'{"messages": [{"author": {"name": "bob"}, "content": "Hi"}]}',
            r"Who speaks is an object: .*`jq .* 'dataset\.role_map=\{ann: assistant",
        ),
        (
            b"{\"messages\": \"[{'role': 'user', 'content': 'Hi'}]\"}",
            r"under messages is a list as Python prints it, not JSON .*map\(ast\.literal_eval\)",
        ),
        (
            b"[01/01/2024, 10:00:00] Ann: Hi\n[01/01/2024, 10:01:00] Bob: Hello\n",
            "is not JSON but plain text",
        ),
        (
            b'{"turns": [{"speaker": "user", "text": "Hi", "time": 1}, '
            b'{"speaker": "bot", "text": "Hello", "time": 2}]}',
            r"its keys are speaker, text, time\..*say 'dataset\.columns=\{messages: turns\}'",
        ),
        (
            b'{"text": "<s>[INST] Hi [/INST] Hello </s>"}',
            r"under text is a chat as a template has written it \(with \[INST\]\).*split it into "
            r"messages, as \{.*\}\.$",
        ),
        (b'{"system": "x", "chat": "USER: Hi\\n\\nASSISTANT: Hello"}', "under chat is a chat as a"),
        (b'{"text": "<|im_start|>user\\nHi<|im_end|>"}', r"written it \(with <\|im_start\|>\)"),
        (
            b'{"type": "user", "message": {"role": "user", "content": "Hi"}}',
            "hold one message, under message: gather",
        ),
        (
            b'{"Messages": [{"Role": "user", "Content": "Hi"}]}\n{}',
            "Under Messages stands a list of objects, whose keys are Role, Content",
        ),
        (
            b'{"prompt": "Hi", "answers": [{"answer": "A", "rank": 2}, {"answer": "B"}]}\n{}',
            r"Under answers .* keys are answer, rank.* answers\.0\.KEY .*say what their texts",
        ),
        (
            b'{"context": [{"role": "user", "content": "Hi"}], "response1": "A"}\n{}',
            r"stand turns: .*dataset.columns=\{user: context, assistant: KEY\}'",
        ),
        (
            b'{"chat": [{"role": "customer", "content": "Hi"}, {"role": "bot", "content": "Ho"}]}',
            r"say 'dataset\.columns=\{messages: chat\}' 'dataset\.role_map=\{customer: user\}' "
            r"\(the roles of customer are guessed\)\.$",
        ),
        (
            b'{"a": {"b": [{"speaker": "agent", "text": "Hi"}, {"speaker": "Ann", "text": "Ho"}]}}',
            r"\{messages: a\.b\}' 'dataset\.role_map=\{agent: assistant, Ann: user\}' \(.* agent, "
            "Ann are guessed",
        ),
        (
            b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "Zed", "content": "Ho"}]}',
            r"the role is 'Zed'. Say .* as in 'dataset\.role_map=\{Zed: assistant\}'",
        ),
        (
            b'{"messages": [{"role": "Ann", "content": "Hi"}]}\n'
            b'{"messages": [{"role": "Ann", "content": "Hi"}, {"role": "Bob", "content": "Ho"}]}',
            r"'dataset\.role_map=\{Ann: user, Bob: assistant\}'",
        ),
        (
            b'{"messages": [{"role": "Ann", "content": "Hi"}, {"role": "bot", "content": 3}]}',
            r"'dataset\.role_map=\{Ann: user\}'",
        ),
        (b'{"messages": [{"role": "a:b", "content": "Hi"}]}', r"\{narrator: system\}"),
        (
            b'{"export": {"of": {"threads": [{"x": {"talk": [{"role": "user", "content": "Hi"}, '
            b'{"role": "bot", "content": "Ho"}]}}, {"x": {"talk": []}}]}}}',
            r"its keys are x\. If .*'dataset\.columns=\{messages: x\.talk\}'",
        ),
        (
            b'{"role": "user", "message": "Hi"}\n{"role": "bot", "message": "Hello"}\n',
            "Each record seems to be one message: gather those of a chat in a list",
        ),
        (
            parquet([{"chat": 1, "speaker": "Ann", "utterance": "Hi"}]),
            "its columns are chat, speaker, utterance. Each record seems to be one message",
        ),
        (b'{"export": {"threads": [{"x": 1}, {"x": 2}]}}', r"its keys are export\."),
        (
            b'{"conversation": [{"message": "Hi", "is_human": true}]}\n{}',
            "its keys are message, is_human. Neither dataset.role_map nor .* write them with keys",
        ),
        (
            b'{"data": {"talk": [{"role": "user", "text": "Hi"}, {"role": "bot", "text": "Ho"}]}, '
            b'"annotations": [{"result": []}]}\n{}',
            r"Its annotations are not read: .*say 'dataset\.columns=\{messages: data\.talk\}'",
        ),
        (
            b'{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Hi"}]}}',
            "they are the requests of a batch, whose answers are in its output file",
        ),
        (
            b'{"messages": [{"role": "user", "content": "Hi"}], "response": null}\n'
            b'{"messages": [{"role": "user", "content": "Hi"}], "response": '
            b'{"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}}',
            r"\{user: messages, assistant: response\.choices\.0\.message\.content\}",
        ),
        (b"BZh91AY&SY", "is cut off in its compressed data"),
        (bzip2(LINES)[:-3], "is cut off in its compressed data"),
        (bzip2(LINES)[:40] + b"x" + bzip2(LINES)[41:], "is damaged"),
        (b"\xfd7zXZ\0", "is cut off in its compressed data"),
        (xz(LIST)[:-30], "is cut off in its compressed data"),
        (xz(LIST)[:60] + b"x" + xz(LIST)[61:], "is damaged"),
        (gzipped(LINES)[:40] + b"\0" + gzipped(LINES)[41:], "is damaged"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, data, words):
    path = write(tmp_path / "some chats.json", data)
    message = fault_of(path)
    assert re.search(words, message), message


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", LIST)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)  # root may read all
    assert "cannot be read: Permission denied" in fault_of(path)


@pytest.mark.parametrize("as_list", [True, False])
def test_one_record_in_another_encoding_among_many(tmp_path, as_list):
    bad = LINES.split(b"\n")[2].decode().encode("latin-1")
    lines = [*LINES.split(b"\n")[:2], bad, LINES.split(b"\n")[3]]
    data = b"[" + b",".join(lines) + b"]" if as_list else b"\n".join(lines)
    reading = read_conversations(write(tmp_path / "a.json", data))
    assert len(list(reading)) == 3 and reading.dropped == {"not valid UTF-8": 1}


@pytest.mark.parametrize("as_list", [True, False])
def test_one_broken_byte_costs_its_record_alone(tmp_path, as_list):
    """All the others are ASCII: nothing but it says that the file is UTF-8."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    plain = json.dumps({"messages": turns}).encode()
    lines = [*[plain] * 20, plain.replace(b'"q"', b'"\xe9"')]
    data = b"[" + b",".join(lines) + b"]" if as_list else b"\n".join(lines)
    reading = read_conversations(write(tmp_path / "a.json", data))
    assert len(list(reading)) == 20 and reading.dropped == {"not valid UTF-8": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            [{"question": "Hi", "answer": "Hello"}],
            r"what is not there: ansxer \(did you mean answer\?\)",
        ),
        (
            [{"Question": "Hi", "n": {"texts": "Hello"}}],
            r"not there: question \(did you mean Question\?\), ansxer\.$",
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "table"])
def test_a_key_that_is_not_there_is_named(tmp_path, data, words, form):
    text = parquet(data) if form == "table" else json.dumps(data).encode()
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=words):
        list(read_conversations(path, columns={"user": "question", "assistant": "ansxer"}))


def test_a_whole_that_is_too_large_is_no_record(tmp_path):
    turns = [{"speaker": name, "text": "Hi", "time": 1} for name in ("user", "bot")]
    path = write(tmp_path / "a.json", json.dumps({"turns": turns}).encode())
    with pytest.raises(DataError, match=r"\{messages: turns\}"):
        list(read_conversations(path))
    with pytest.raises(DataError) as error:
        list(read_conversations(path, max_record_bytes=60))
    assert "{messages: turns}" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "https://example.com/a.jsonl",
            "download the file .* 'dataset=hub dataset.path=OWNER/NAME",
        ),
        (
            "https://huggingface.co/datasets/a/b/resolve/main/c.json",
            "dataset=hub dataset.path=a/b'",
        ),
    ],
)
def test_an_address_of_the_web(path, words):
    with pytest.raises(DataError, match=f"is a URL: .*{words}"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "tool_use", "name": "f"}, "of type tool_use: write calls as tool_calls"),
        ({"functionCall": {"name": "f"}}, "its keys are functionCall: write calls as tool_calls"),
        ({"type": "reasoning", "summary": []}, "it is of type reasoning: leave such parts out"),
    ],
)
def test_a_part_that_is_not_text_is_named_by_its_type(tmp_path, part, words):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [part]}]
    reading = read_conversations(write(tmp_path / "a", json.dumps({"messages": turns}).encode()))
    assert not list(reading) and words in reading.told()


def test_calls_as_python_prints_them_can_be_had_as_text(tmp_path):
    call = {"role": "tool_call", "content": "{'name': 'f', 'arguments': '{}'}"}
    turns = [{"role": "user", "content": "q"}, call, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a", json.dumps({"messages": turns}).encode())
    reading = read_conversations(path)
    assert not list(reading)
    assert "have it as text by 'dataset.role_map={tool_call: assistant}'" in reading.told()
    (chat,) = read_conversations(path, role_map={"tool_call": "assistant"})
    assert chat.messages[1].content == call["content"]


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize(
    ("data", "role_map"),
    [
        (
            [{"type": "message", "user": f"U{n}", "text": "Hi", "ts": "1", "n": n} for n in (1, 2)],
            {"U1": "user", "U2": "assistant"},
        ),
        (
            [
                {"user_name": "You", "character_name": "Aria", "chat_metadata": {}},
                {"name": "You", "is_user": True, "mes": "Hi"},
                {"name": "Aria", "is_user": False, "mes": "Hi"},
            ],
            {},
        ),
    ],
)
def test_the_command_for_an_export_writes_chats(tmp_path, data, role_map):
    lines = "\n".join(map(json.dumps, data)) if not role_map else json.dumps(data)
    message = fault_of(write(tmp_path / "a.json", lines.encode()))
    command = re.search(r"`(jq .*?)`", message)[1].replace("FILE", "a.json")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (chat,) = read_conversations(tmp_path / "chats.jsonl", role_map=role_map)
    assert [message.role for message in chat.messages] == ["user", "assistant"]
