import gzip
import json
import os
import sys
from errno import EACCES
from pathlib import Path

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

from medusa_exp.data import DataError, Message, read_conversations
from medusa_exp.data.chat_files import find_files


@pytest.mark.parametrize(
    "data",
    [
        LIST,
        LINES,
        PRETTY,
        BOM + LIST,
        BOM + LINES,
        BOM + b"\n" + LINES,
        b"\r\n \n" + LIST + b"\n\n",
        b"\n\n" + LINES.replace(b"\n", b"\r\n\r\n"),
        LINES.rstrip(),
        gzipped(LIST),
        gzipped(LINES[:100]) + gzipped(LINES[100:]),
        gzipped(BOM + LINES),
        bzip2(LIST),
        bzip2(LINES[:100]) + bzip2(LINES[100:]),
        xz(LIST),
        xz(LINES[:100]) + xz(LINES[100:]),
        zstd(LIST),
        zstd(LINES[:100]) + zstd(LINES[100:]),
        b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd(LINES),
        parquet(RECORDS),
        gzipped(parquet(RECORDS)),
        arrow(RECORDS),
        arrow(RECORDS, compression="zstd"),
        arrow_stream(RECORDS),
        gzipped(arrow(RECORDS)),
        zstd(arrow_stream(RECORDS)),
    ],
)
@pytest.mark.parametrize("name", ["chats.json", "chats.parquet"])
def test_containers_are_told_apart_by_content(tmp_path, data, name):
    reading = read_conversations(write(tmp_path / name, data))
    assert [c.id for c in reading] == [f"r-{number}" for number in range(5)]
    assert next(iter(reading)).messages[0] == Message("user", "What is 0? caf\u00e9")
    assert not list(reading)[5:] and reading.num_records == 5 and not reading.dropped


def test_much_white_space_before_a_list(tmp_path):
    path = write(tmp_path / "a.json", b"\n" * (1 << 20) + LIST)
    assert len(list(read_conversations(path))) == 5


@pytest.mark.parametrize("by_ids", [False, True])
@pytest.mark.parametrize("keys", [["items"], ["result", "items"], ["a", "b", "c", "d"]])
def test_chats_within_objects(tmp_path, keys, by_ids):
    value = {record["id"]: record for record in RECORDS} if by_ids else RECORDS
    for key in reversed(keys):
        value = {key: value, "status": 200}
    reading = read_conversations(write(tmp_path / "a.json", json.dumps(value)))
    assert [c.id for c in reading] == [f"r-{number}" for number in range(5)]


def test_one_record_over_several_lines(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(RECORDS[0], indent=1))
    assert [c.id for c in read_conversations(path)] == ["r-0"]


def test_rows_of_a_table_with_the_columns_of_two_forms(tmp_path):
    part = {"type": "text", "text": "Hi", "image": None}
    rows = [
        {"messages": [{"role": "user", "content": [part]}, {"role": "gpt", "content": [part]}]},
        {"messages": [{"role": "user", "content": [part | {"type": "image"}]}], "id": 3},
        {"messages": None},
    ]
    reading = read_conversations(write(tmp_path / "a", parquet([r | {"n": b"\xff"} for r in rows])))
    (found,) = reading
    assert found.messages == [Message("user", "Hi"), Message("assistant", "Hi")]
    assert found.id.startswith("sha256-")
    assert reading.dropped == {
        "a picture, a sound or a video": 1,
        "no known form of chat": 1,
    }


@pytest.mark.parametrize(
    "odd",
    [
        '"x": NaN',
        '"x": [-Infinity, {"y": Infinity}]',
        r'"x": "\ud800"',
        r'"x": "\udc00 \\ud800 \"NaN\" \ud83d\ude00"',
        '"x": "a\tb\0c"',
        r'"x": "\\", "y": NaN',
    ],
)
def test_what_python_writes_beyond_json_is_named_in_a_list_and_taken_in_lines(tmp_path, odd):
    texts = [json.dumps(record) for record in RECORDS]
    texts[2] = texts[2].replace('"id": "r-2",', f'"id": "r-2", {odd},')
    as_list = "[\n" + ",\n".join(texts) + "\n]\n"

    with pytest.raises(DataError, match=r"not valid JSON: .*: line 4, column \d+\. As JSON Lines"):
        list(read_conversations(write(tmp_path / "a.json", as_list)))

    reading = read_conversations(write(tmp_path / "a.jsonl", "\n".join(texts)))
    assert [c.id for c in reading] == [f"r-{number}" for number in range(5)]


def test_lines_that_are_no_json_cost_themselves(tmp_path):
    lines = LINES.split(b"\n")
    data = b"\n".join([b"# comment", lines[0], lines[1][:40], lines[2], lines[3][:-30]])
    reading = read_conversations(write(tmp_path / "a.jsonl", data))
    assert [c.id for c in reading] == ["r-0", "r-2"]
    assert reading.dropped == {"not valid JSON": 3}


def test_a_broken_first_line_that_looks_like_the_start_of_a_value(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"id": "a",\n' + LINES)
    reading = read_conversations(path)
    assert len(list(reading)) == 5 and reading.dropped == {"not valid JSON": 1}


def test_files_of_folders_and_globs(tmp_path):
    plain, packed = (
        "a.json b/c.jsonl b/d.ndjson e.parquet",
        "f.json.gz g.jsonl.zst h.parquet.gz h.arrow",
    )
    names = f"{plain} {packed} i.csv.xz j.json.bz2".split()
    for name in [*names, "x.txt", "x.gz", ".cache/y.json", "b/.z.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, LINES)
    assert find_files(tmp_path) == sorted(tmp_path / name for name in names)
    assert find_files(f"{tmp_path}/**/*.?d*json") == [tmp_path / "b/d.ndjson"]
    odd = write(tmp_path / "[odd]*.json", LINES)
    assert find_files(odd) == [odd]


def test_paths_that_lead_nowhere(tmp_path):
    for path in (tmp_path / "no.json", f"{tmp_path}/*.json"):
        with pytest.raises(DataError, match=r"there is no such file.*dataset\.path"):
            find_files(path)
    with pytest.raises(DataError, match=r"holds no \*\.json"):
        find_files(tmp_path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"pipe\.json is no regular file but a pipe.*into a file"):
        find_files(tmp_path / "pipe.json")


def test_a_folder_says_what_it_passes_over(tmp_path, caplog):
    for name in ("a.json", "B.JSON", "c.txt", "d.json.lz4"):
        (tmp_path / name).write_bytes(b"[]")
    found = find_files(tmp_path)
    assert [path.name for path in found] == ["B.JSON", "a.json"]
    assert "2 files passed over: c.txt, d.json.lz4" in caplog.text


def lock(folder, monkeypatch):
    """Let nobody read a folder, root neither."""
    scandir = os.scandir

    def refuse(path):
        if Path(path) == folder:
            raise PermissionError(EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("of_whole", [True, False])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, of_whole):
    locked = tmp_path / "chats" if of_whole else tmp_path / "chats/locked"
    locked.mkdir(parents=True)
    write(tmp_path / "chats/a.json", LIST)
    lock(locked, monkeypatch)
    with pytest.raises(DataError, match=f"^{locked} cannot be read: Permission denied"):
        find_files(tmp_path / "chats")


@pytest.mark.parametrize("pattern", ["**/*.json", "*/*.json", "locked/*.json", "**"])
def test_a_glob_names_a_folder_that_may_not_be_read(tmp_path, monkeypatch, pattern):
    locked = tmp_path / "locked"
    locked.mkdir()
    write(tmp_path / "a.json", LIST)
    lock(locked, monkeypatch)
    assert find_files(f"{tmp_path}/*.json") == [tmp_path / "a.json"]  # it does not look in there
    with pytest.raises(DataError, match=f"^{locked}/? cannot be read: Permission denied"):
        find_files(f"{tmp_path}/{pattern}")


def test_a_glob_reads_nothing_twice_and_says_what_it_passes_over(tmp_path, caplog):
    (tmp_path / "z").mkdir()
    write(tmp_path / "z/a.json", LIST)
    (tmp_path / "z/loop").symlink_to(".")
    (tmp_path / "y").symlink_to("z")
    (tmp_path / "gone.json").symlink_to("nowhere.json")
    assert find_files(f"{tmp_path}/**/*.json") == [tmp_path / "y/a.json"]
    assert f"1 files passed over: {tmp_path}/gone.json (a broken link)" in caplog.text
    caplog.clear()
    assert find_files(f"{tmp_path}/z/*") == [tmp_path / "z/a.json"]
    assert f"1 files passed over: {tmp_path}/z/loop (a folder)" in caplog.text


def test_a_glob_names_files_by_the_shortest_way(tmp_path, caplog):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "a/b/up").symlink_to("../..")
    (tmp_path / "c/gone.json").symlink_to("nowhere.json")
    files = [write(tmp_path / name, LIST) for name in ("a/1.json", "c/2.json")]
    assert find_files(f"{tmp_path}/**/*.json") == files
    assert f"1 files passed over: {tmp_path}/c/gone.json (a broken link)\n" in caplog.text


def test_links_to_folders_are_followed_but_not_twice(tmp_path, caplog):
    folder = tmp_path / "chats"
    for name in ("chats/z/a.json", "chats/.hidden/b.json", "elsewhere/d/c.json", "e.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, LIST)
    links = {"loop": ".", "y": "z", "again": "../elsewhere/d", "up": "..", "m": "../elsewhere"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert find_files(folder) == [folder / "again/c.json", folder / "z/a.json"]
    assert (
        "3 files passed over: loop (a link to a folder that is read anyway), "
        "up (a link to a folder that it is in), y (a link to a folder that is read anyway)"
    ) in caplog.text


def test_a_folder_of_the_systems_that_may_not_be_read_is_passed_over(tmp_path, caplog, monkeypatch):
    """On a whole disk it is there, and nobody but its administrator may read it."""
    for name in ("lost+found", "more"):
        (tmp_path / name).mkdir()
    write(tmp_path / "more/a.json", LIST)
    lock(tmp_path / "lost+found", monkeypatch)
    assert find_files(tmp_path) == [tmp_path / "more/a.json"]
    assert "1 files passed over: lost+found (may not be read)" in caplog.text


def test_what_is_no_file_is_named(tmp_path, caplog):
    links = {"gone.json": "nowhere.json", "ring.json": "ring.json", "there.json": "a"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"holds gone\.json \(a broken link\), pipe"):
        find_files(tmp_path)
    write(tmp_path / "a", LIST)
    assert find_files(tmp_path) == [tmp_path / "there.json"]
    assert (
        "4 files passed over: gone.json (a broken link), pipe.json (no regular "
        "file), ring.json (a broken link), a"
    ) in caplog.text


def test_no_name_is_a_command_to_the_terminal(tmp_path, caplog):
    caplog.set_level("INFO")
    odd = "a\x1b[31m\x9b\r"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    write(tmp_path / "a.json", json.dumps([{"conversations": turns, odd: 1}]).encode())
    write(tmp_path / f"{odd}.md", b"")
    assert len(list(read_conversations(tmp_path))) == 1
    write(tmp_path / "b.json", json.dumps([{odd: 1}]).encode())
    with pytest.raises(DataError) as raised:
        list(read_conversations(tmp_path / "b.json"))
    said = f"{caplog.text} {raised.value}"
    assert said.count(r"a\x1b[31m\x9b\r") >= 3 and odd not in said


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_long_and_blank_lines(tmp_path, packed):
    """What is too long is not kept in memory, and blank lines are skipped by the block."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    good = json.dumps({"conversations": turns}).encode()
    long = json.dumps({"conversations": turns, "x": "y" * (3 << 20)}).encode()
    blank = b"\n" * (3 << 20)
    text = b"\n".join([good, long, blank + good, b" " * (3 << 20), b" " + good])
    path = write(tmp_path / "a.jsonl", packed(text))
    reading = read_conversations(path, max_record_bytes=1 << 20)
    assert [chat.number for chat in reading] == [1, 3, 4]
    assert reading.dropped == {"larger than dataset.max_record_bytes": 1}
    assert reading.examples == {
        "larger than dataset.max_record_bytes": f"{path}, record 2 (line 2): it has "
        f"{len(long) + 1:,} bytes"
    }
    with pytest.raises(
        DataError, match=f"record 2 .line 2.: larger than .*{len(long) + 1:,} bytes"
    ):
        list(read_conversations(path, max_record_bytes=1 << 20, strict=True))
    one = write(tmp_path / "one.json", packed(b'{"train": [' + b",".join([good, long]) + b"]}"))
    reading = read_conversations(one, max_record_bytes=1 << 20)
    assert len(list(reading)) == 1 and reading.dropped.total() == 1


@pytest.fixture
def no_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)


@pytest.mark.parametrize("data", [LIST, LINES, gzipped(LIST), bzip2(LIST), xz(LINES)])
def test_json_needs_no_pyarrow(tmp_path, no_pyarrow, data):
    assert len(list(read_conversations(write(tmp_path / "chats.json", data)))) == 5


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (parquet(RECORDS), "Parquet"),
        (gzipped(parquet(RECORDS)), "Parquet"),
        (arrow(RECORDS), "Arrow"),
        (gzipped(arrow_stream(RECORDS)), "Arrow"),
        (zstd(LIST), "packed by zstd"),
    ],
)
def test_what_needs_pyarrow_says_so(tmp_path, no_pyarrow, data, kind):
    path = write(tmp_path / "chats.json", data)
    write(tmp_path / "others.json", LIST)
    for named in (path, tmp_path):  # in a folder too, it is not passed over
        with pytest.raises(DataError) as caught:
            list(read_conversations(named))
        expected = f"{path} is {kind}, which needs pyarrow: pip install 'medusa-exp[parquet]'"
        assert str(caught.value) == expected
