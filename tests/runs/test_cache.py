"""Cache entries: made once, whole or not at all."""

import multiprocessing
import time
from pathlib import Path

import pytest

from medusa_exp.runs.cache import entry


def test_an_entry_is_made_once_and_found_again(tmp_path):
    with entry(tmp_path, "kind", "key") as (path, unwritten):
        unwritten.mkdir()
        (unwritten / "content").write_text("whole")
        assert not path.exists()

    with entry(tmp_path, "kind", "key") as (found, unwritten):
        assert found == path and unwritten is None
        assert (found / "content").read_text() == "whole"


def _interrupted(root: Path) -> None:
    with entry(root, "kind", "key.json") as (_, unwritten):
        unwritten.write_text("half")
        raise KeyboardInterrupt


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path)

    assert [path.name for path in (tmp_path / "kind").iterdir()] in ([], [".key.lock"])


def test_a_damaged_entry_is_made_anew(tmp_path):
    path = tmp_path / "kind" / "key"
    path.mkdir(parents=True)
    (path / "content").write_text("damaged")

    with entry(tmp_path, "kind", "key", lambda p: (p / "summary").is_file()) as (_, unwritten):
        unwritten.mkdir()
        (unwritten / "summary").write_text("whole")

    assert sorted(found.name for found in path.iterdir()) == ["sha256.json", "summary"]


def _make(root: Path, number: int) -> None:
    with entry(root, "kind", "key") as (_, unwritten):
        if unwritten:
            (root / f"made by {number}").touch()
            time.sleep(0.5)
            unwritten.write_text("whole")


def test_of_several_processes_one_makes_it(tmp_path):
    context = multiprocessing.get_context("fork")  # under spawn, nobody could import this module
    processes = [context.Process(target=_make, args=(tmp_path, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert len(list(tmp_path.glob("made by *"))) == 1
    assert (tmp_path / "kind" / "key").read_text() == "whole"
