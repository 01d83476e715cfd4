import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.runs import files
from medusa_exp.runs.files import (
    Appender,
    _drop_leftovers_once,
    drop_torn_line,
    publish,
    read_json,
    read_jsonl,
    settings_in_key,
    write_json,
    write_jsonl,
)
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking.history import HistoryLogger


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)

    def fails() -> None:
        with publish(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert read_json(path) == 1 and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole(tmp_path):
    for number in (1, 2):
        with publish(tmp_path / "dir") as partial:
            partial.mkdir()
            (partial / str(number)).touch()
    assert [p.name for p in (tmp_path / "dir").iterdir()] == ["2"]
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]


def test_others_may_read_what_a_library_has_written_for_its_owner_alone(tmp_path):
    (tmp_path / "usual").touch()
    with publish(tmp_path / "file") as partial:
        partial.touch(0o600)
    with publish(tmp_path / "dir") as partial:
        partial.mkdir()
        (partial / "inside").touch(0o600)
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == usual
    assert (tmp_path / "dir/inside").stat().st_mode == usual
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_said(tmp_path):
    def fails(error: Exception) -> None:
        with publish(tmp_path / "heads") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(UserError, match=r"heads could not .* its disk is full\. .*: make"):
        fails(RuntimeError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(RuntimeError, match="other"):
        fails(RuntimeError("other"))


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_broken_json_names_its_file(tmp_path):
    (tmp_path / "value.json").write_text("{")
    with pytest.raises(UserError, match=r"value\.json is not valid JSON"):
        read_json(tmp_path / "value.json")


def test_a_torn_line_is_cut_off_before_more_is_added(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a":')
    assert read_jsonl(path) == [{"a": 1}]
    drop_torn_line(path)
    with path.open("a") as file:
        file.write('{"a": 2}\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    for content in ("", "x" * 3, "\n", "x\n" + "y" * 3, "x" * 20 + "\n" + "y" * 20):
        path.write_text(content)
        with monkeypatch.context() as patch:
            patch.setattr("medusa_exp.runs.files._PART", 3)
            drop_torn_line(path)
        assert path.read_text() == content[: content.rfind("\n") + 1]
    path.write_text('{"a":\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl, line 1, is not valid JSON"):
        read_jsonl(path)


def test_whole_lines_are_left_alone_to_which_others_may_add(tmp_path):
    """Every process of a training looks at its history, and the first one writes it."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n')
    os.utime(path, (1, 1))
    drop_torn_line(path)
    assert path.stat().st_mtime == 1 and read_jsonl(path) == [{"a": 1}]


def test_a_line_that_is_being_written_is_not_read_in_two(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    read_value = files._value

    def while_another_writes(content: bytes, *args: object) -> object:
        if not content.endswith(b"\n"):
            with path.open("a") as file:
                file.write("2}\n")
        return read_value(content, *args)

    monkeypatch.setattr(files, "_value", while_another_writes)
    assert read_jsonl(path) == [{"a": 1}]
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_nothing_is_added_to_what_is_no_file_of_its_own(tmp_path):
    """A run directory that others made may have a link there, or a pipe that keeps all waiting."""
    (tmp_path / "other").write_text("theirs, without an end of line")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("link", "is a link"), ("gone", "is a link"), ("pipe", "is no file")):
        with pytest.raises(UserError, match=f"{name} {said}"):
            drop_torn_line(tmp_path / name)
    assert (tmp_path / "other").read_text().startswith("theirs")


def test_a_key_that_the_schema_gains_later_names_nothing_anew_at_its_default():
    @dataclass
    class Section:
        steps: int = 3
        devices: int = 1
        later: str = "off"

    assert settings_in_key(Section(), ["steps"], but=["devices"]) == {"steps": 3}
    changed = Section(later="on", devices=2)
    assert settings_in_key(changed, ["steps"], but=["devices"]) == {"steps": 3, "later": "on"}


def test_contents_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    synced, at_rename = set(), []
    sync, rename = os.fsync, Path.replace

    def note_sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def note_rename(path, target):
        at_rename.append(
            {p.name for p in [path, *path.rglob("*")] if p.stat().st_ino not in synced}
        )
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    with publish(tmp_path / "dir") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "file").write_text("x")
    write_json(tmp_path / "value.json", 1)
    assert at_rename == [set(), set()]
    assert tmp_path.stat().st_ino in synced, "and the name itself"


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_one(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from medusa_exp.runs.files import publish\n"
        "for name in ('file', 'folder'):\n"
        "    place = publish(Path(sys.argv[1], name)).__enter__()\n"
        "    place.mkdir() if name == 'folder' else place.touch()\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    other = {re.sub(r"partial-\w+", "partial-00000000", name) for name in left}
    for name in other:
        (tmp_path / name).touch()
    (old := tmp_path / f"{min(other)}.old").mkdir()
    os.utime(old, (1e9, 1e9))
    with publish(tmp_path / "a") as a:
        a.touch()
        _drop_leftovers_once.cache_clear()
        write_json(tmp_path / "b", 1)
        assert a.exists(), "it is being written"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", *other}, "of another machine"


def test_a_file_of_lines_may_be_large_or_empty(tmp_path, monkeypatch, caplog):
    """It grows with the work: nobody may be told to move away hours of answers."""
    monkeypatch.setattr("medusa_exp.runs.files.MOST_BYTES", 10)
    path = tmp_path / "answers.jsonl"
    path.write_text("")
    assert read_jsonl(path) == [] and not caplog.messages
    path.write_text('{"a": 1}\n' * 5)
    assert read_jsonl(path) == [{"a": 1}] * 5
    path.write_text('{"a": 1}\n{"a":      1}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl, line 2, is longer than"):
        read_jsonl(path)
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a gigabyte of nothing, as some file systems leave after a crash
    with pytest.raises(UserError, match=r"line 1, is longer than"):
        read_jsonl(path)
    (tmp_path / "value.json").write_text("[" + "1, " * 9 + "1]")
    with pytest.raises(UserError, match="is larger than"):
        read_json(tmp_path / "value.json")


def test_lines_end_alike_on_every_system(tmp_path, monkeypatch):
    """Their checksums are of one text: on Windows, Python would write other ends."""
    original = io.open

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest):
        is_written = "b" not in mode and any(word in mode for word in "wax")
        ends = "\r\n" if is_written and newline is None else newline
        return original(file, mode, buffering, encoding, errors, ends, *rest)

    monkeypatch.setattr(io, "open", opened)
    (tmp_path / "probe").write_text("\n")
    assert (tmp_path / "probe").read_bytes() == b"\r\n", "it is as on Windows"
    write_json(tmp_path / "a", {"b": [1]})
    write_jsonl(tmp_path / "b", [1, 2])
    with Appender(tmp_path / "c") as file:
        file.append(1)
    HistoryLogger(tmp_path, "train").log_metrics({"d": 1.0}, 1)
    for name in ("a", "b", "c", "history.jsonl"):
        assert b"\r" not in (tmp_path / name).read_bytes(), name
    config = Config(device="cpu")
    RunRecord(tmp_path, config, []).merge_metrics("train", {"train/loss": 1.0})
    RunRecord(tmp_path, config, [])
