"""What `runs.clean` shows and removes, and above all what it does not."""

import errno
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from listed_runs import RUN, make_old, stages, write, write_run

from medusa_exp.runs.clean import main

ENTRIES = (
    "synthetic/d1.json",
    "tokenised/t1/summary.json",
    "tokenised/t2/summary.json",
    "regenerated/r1/summary.json",
    "regenerated/.r1.answers.jsonl",
    "regenerated/.r3.answers.jsonl",
    "pretrained/m1/config.json",
    "pretrained/m2/config.json",
    "features/f1/hidden.npy",
    "features/f2/hidden.npy",
    "features/.f3.partial-0/hidden.npy",
    "continuations/c1.safetensors",
    "continuations/.c1.safetensors.sha256.json",
)
NOTED = {**RUN, "cache_keys": {**RUN["cache_keys"], "regenerated": "r1"}}


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_run(tmp_path / "a", NOTED)
    for name in ENTRIES:
        write(tmp_path / "cache" / name, "x" * 5000)
    make_old(tmp_path)
    return tmp_path


def left(outputs: Path) -> set[str]:
    cache = outputs / "cache"
    return {str(path.relative_to(cache)) for path in cache.glob("*/*") if path.suffix != ".lock"}


def removed(outputs: Path, *options: str) -> set[str]:
    before = left(outputs)
    main([str(outputs), *options])
    return before - left(outputs)


def test_nothing_is_removed_unless_it_is_asked_for_twice(outputs, capsys):
    assert removed(outputs) == removed(outputs, "--unused") == set()
    out = capsys.readouterr().out
    assert "would be removed" in out and "add --yes" in out and "hidden states" in out
    assert removed(outputs, "--yes") == set()


def test_what_no_run_has_noted_can_go(outputs):
    assert removed(outputs, "--unused", "--yes") == {
        "tokenised/t2",
        "regenerated/.r3.answers.jsonl",
        "pretrained/m2",
        "features/f2",
        "features/.f3.partial-0",
    }


def test_of_a_kind_all_can_go_that_is_made_again_by_itself(outputs):
    wanted = ["--kind", "features", "--kind", "regenerated", "--kind", "pretrained"]
    assert removed(outputs, *wanted, "--yes") == {
        "features/f1",
        "features/f2",
        "features/.f3.partial-0",
        "regenerated/.r3.answers.jsonl",
        "pretrained/m2",
    }
    assert (outputs / "cache/pretrained/m1/config.json").is_file()
    assert removed(outputs, "--kind", "continuations", "--yes") == {
        "continuations/c1.safetensors",
        "continuations/.c1.safetensors.sha256.json",
    }


@pytest.mark.parametrize("status", ["failed", "running"])
def test_what_a_run_that_is_not_done_has_noted_stays(outputs, status):
    keys = {**NOTED, "stages": {**stages(calibrate=status)["stages"], **RUN["stages"]}}
    write_run(outputs / "b", keys)
    gone = removed(outputs, *(f"--kind={kind}" for kind in ("features", "continuations")), "--yes")
    assert gone == {"features/f2", "features/.f3.partial-0"}


def test_runs_in_another_place_count_when_it_is_named(outputs, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_run(other / "z", {**NOTED, "cache_keys": {"tokenised": "t2", "model": "m2"}})
    gone = removed(outputs, "--unused", "--yes", f"--runs={other}")
    assert gone & {"tokenised/t2", "pretrained/m2"} == set() and "features/f2" in gone


def test_who_cannot_be_asked_what_it_needs_keeps_everything(outputs):
    write(outputs / "b" / "run.json", "{")
    with pytest.raises(SystemExit, match="Nothing was removed"):
        removed(outputs, "--unused", "--yes")
    assert len(left(outputs)) == len(ENTRIES)


def test_what_is_new_or_being_made_stays(outputs):
    with FileLock(outputs / "cache/features/.f2.lock"):
        assert "features/f2" not in removed(outputs, "--unused", "--yes")
    write(outputs / "cache/features/.f4.partial-1/hidden.npy", "x")
    assert removed(outputs, "--unused", "--older", "5", "--yes") == set()
    assert removed(outputs, "--unused", "--older", "2", "--yes") == {"features/f2"}
    assert "features/.f4.partial-1" in left(outputs)


def test_a_file_system_without_locks_is_cleaned_too(outputs, monkeypatch):
    def refused(lock: FileLock) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", refused)
    assert "features/f2" in removed(outputs, "--unused", "--yes")


def test_a_cache_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="name the cache by --cache"):
        main([str(tmp_path)])


def test_age_is_that_of_the_newest_file(outputs):
    os.utime(outputs / "cache/features/f2/hidden.npy", (time.time(),) * 2)
    assert "features/f2" not in removed(outputs, "--unused", "--older", "1", "--yes")
