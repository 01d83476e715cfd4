"""What the machine refuses is one message with path and remedy; what is ours stays a traceback."""

import errno
import io
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from medusa_exp import cli
from medusa_exp.errors import UserError
from medusa_exp.runs import machine_faults
from medusa_exp.runs.machine_faults import message, told


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    """What `cli.main` puts in place of others' functions is taken back after each test."""
    monkeypatch.setattr(logging.Handler, "handleError", logging.Handler.handleError)
    monkeypatch.setattr(cli.hydra_utils, "run_and_report", cli.hydra_utils.run_and_report)


def broken(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (broken(errno.ENOSPC, "/x/y"), "/x/y could not be written or read: its disk"),
        (broken(errno.ENOSPC), "OUT could not be written or read: its disk is full"),
        (broken(errno.EROFS, "/x"), "/x .* is read-only.*give the key that named this place"),
        (broken(errno.EACCES, "/x"), "/x .*permission is denied.*give it those rights"),
        (broken(errno.ENAMETOOLONG, "/x" * 400), r"\.\.\. \(800 characters\).*a shorter run_dir"),
        (broken(errno.EMFILE, "/x"), "too many files are open.*raise ulimit -n"),
        (broken(errno.EIO, "/x"), "/x .*reports an error"),
        (MemoryError(), "no memory left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full"),
        (
            ValueError('IoError(Os { code: 30, kind: ReadOnlyFilesystem, message: "x" })'),
            "read-only",
        ),
        (RuntimeError("[Errno 122] error writing bytes: disk quota exceeded"), "quota"),
    ],
)
def test_what_the_machine_refuses_names_path_and_remedy(error, said, tmp_path):
    found = message(error, (tmp_path, "cache"))
    assert found and re.search(said.replace("OUT", str(tmp_path)), found)
    assert "\n" not in found and "To go on: " in found
    outer = ImportError("a library's own words")
    outer.__cause__ = error
    with pytest.raises(UserError) as caught, told(tmp_path, "cache"):
        raise outer
    assert str(caught.value) == found


def test_a_place_behind_a_link_is_known(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    found = message(broken(errno.ENOSPC, f"{tmp_path}/disk/x"), (tmp_path / "run", "cache"))
    assert found and "another run_dir or cache_dir" in found


@pytest.mark.parametrize("name", ["run/x", "cache/x"])
def test_of_a_runs_own_places_their_keys_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = message(broken(errno.EROFS, str(tmp_path / name)), (tmp_path / "run", "cache"))
    assert "choose another run_dir or cache_dir" in said


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file", "/x"),
        FileExistsError(errno.EEXIST, "exists", "/"),
        TypeError("[Errno x]"),
        KeyError("a"),
        OSError("no number"),
    ],
)
def test_slips_of_ours_keep_their_tracebacks(error, tmp_path):
    with pytest.raises(type(error)), told(tmp_path):
        raise error


def test_what_torch_met_as_it_saved_is_told(tmp_path):
    class Limited(io.BytesIO):
        def write(self, data):
            raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(UserError, match="no file may be so large there"), told(tmp_path):
        torch.save({"weights": torch.ones(9)}, Limited())


def test_a_message_of_ours_stays_as_it_is():
    with pytest.raises(UserError, match=r"^mine$"), told():
        raise UserError("mine") from broken(errno.ENOSPC)


def test_the_disk_that_is_full_is_named(tmp_path, monkeypatch):
    run, cache = tmp_path / "run", tmp_path / "cache"
    cache.mkdir()
    usage = machine_faults.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        machine_faults.shutil,
        "disk_usage",
        lambda place: usage._replace(free=0 if place == cache else 1 << 30),
    )
    said = message(broken(errno.ENOSPC), (run, cache))
    assert said is not None and said.startswith(f"{cache} could not")


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    of_linux = {"of the system": "/proc/x"} if Path("/proc/self").is_dir() else {}
    return {
        **of_linux,
        "a dangling link": f"{tmp_path}/link",
        "below a dangling link": f"{tmp_path}/link/run",
        "a file": f"{tmp_path}/file",
        "below a file": f"{tmp_path}/file/run",
        "a loop": f"{tmp_path}/loop/run",
        "too long": f"{tmp_path}/{'x' * 300}",
        "far too long": f"{tmp_path}/" + "/".join(["x" * 200] * 30),
    }


@pytest.mark.parametrize("key", ["run_dir", "cache_dir"])
def test_odd_places_are_told_in_one_message(places, key, capsys, monkeypatch, tmp_path):
    tried = places if key == "run_dir" else {"too long": places["too long"]}
    for what, place in tried.items():
        out = tmp_path / f"run {what}" if key == "cache_dir" else place
        given = ["+experiment=smoke", "logger=none", "stages=[pretrain]", f"{key}='{place}'"]
        given += [f"run_dir='{out}'"] if key == "cache_dir" else []
        monkeypatch.setattr(sys, "argv", ["medusa_exp", *given])
        # Hydra takes a coverage run for a debugger's, and then shows every traceback.
        monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = (
            left.value.code if isinstance(left.value.code, str) else ""
        ) + capsys.readouterr().err
        assert left.value.code not in (0, None), what
        assert "Traceback" not in said and "To go on: " in said, (what, said)
        assert (tmp_path / "file").read_text() == "mine"
        assert not list(tmp_path.rglob(".*partial*"))


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise broken(errno.ENOSPC)


def test_a_log_without_room_is_quiet(capsys):
    cli._report_in_our_words()
    handler = logging.StreamHandler(FullDisk())
    handler.handle(logging.makeLogRecord({"msg": "a line"}))
    assert "Traceback" not in capsys.readouterr().err
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("x",)}))
    assert "TypeError" in capsys.readouterr().err
