"""What `runs.list` says of run directories: sound ones, ended ones, and what nobody can read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from listed_runs import METRICS, RUN, make_old, stages, write, write_run

from medusa_exp.runs.list import Run, main, read_run, read_runs
from medusa_exp.runs.processes import this_process


def test_a_row_has_what_the_files_say(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    assert run.when == "2026-03-01T10:00:00+00:00" and run.bytes > 0
    shown = (run.experiment, run.model, run.heads, run.status, run.reason)
    assert shown == ("quick", "llama", "medusa x5", "done", "")
    assert (run.tokens_per_step, run.speedup, run.identical) == (3.25, 2.5, 1.0)
    assert run.cache_keys["features"] == ["f1"] and run.cache_keys["synthetic"] == ["d1.json"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("owner/llama", "owner/llama"), ("a/b/c", "c"), ("~/llama", "llama")),
        *(("../llama", "llama"), ("./llama", "llama"), ("./models/llama", "llama")),
    ],
)
def test_a_model_of_the_hub_keeps_its_owner_and_a_path_gives_its_last_folder(tmp_path, path, name):
    run = write_run(tmp_path / "a")
    write(run / ".hydra" / "config.yaml", f"model: {{path: {path}}}\n")
    assert read_run(run).model == name


@pytest.mark.parametrize(
    ("run", "is_old", "status", "reason"),
    [
        (stages(train="done"), True, "done", ""),
        (stages(train="failed"), True, "failed", "train: E: x y"),
        (stages(train="running"), False, "running", "train"),
        (stages(train="running"), True, "stopped", "in stage train, nothing written for 3 days"),
        (stages(inspect="done"), True, "stopped", "before stage train, nothing written for 3 days"),
        ({}, True, "stopped", "before stage train, nothing written for 3 days"),
    ],
)
def test_how_a_run_stands(tmp_path, run, is_old, status, reason):
    write_run(tmp_path / "a", run)
    if is_old:
        make_old(tmp_path / "a")
    found = read_run(tmp_path / "a")
    assert (found.status, found.reason) == (status, reason)


JOB = {"number": 0, "overrides": [], "objective": "x", "value": None}


@pytest.mark.parametrize(
    ("files", "status", "reason"),
    [
        ({"failure.json": {"error": "E: x\ny"}}, "failed", "before stage train: E: x y"),
        (
            {"job.json": {**JOB, "status": "failed", "error": "E: z"}},
            "failed",
            "before stage train: E: z",
        ),
        (
            {"job.json": {**JOB, "status": "running"}, "failure.json": {"error": "E: old"}},
            "running",
            "",
        ),
        ({"job.json": "{"}, "malformed", None),
        ({"failure.json": {"error": "E: old"}, "run.json": stages(train="done")}, "done", ""),
    ],
)
def test_what_failed_before_its_first_stage_says_why(tmp_path, files, status, reason):
    path = write_run(tmp_path / "a")
    (path / "run.json").unlink()
    for name, content in files.items():
        write(path / name, content)
    found = read_run(path)
    assert (found.status, found.reason) == (status, found.reason if reason is None else reason)


HERE, GONE = this_process(), f"{this_process().partition('-')[0]}-4194305"


@pytest.mark.parametrize(
    ("entries", "is_old", "status", "reason"),
    [
        ({"train": {"status": "running", "process": GONE}}, False, "stopped", "in stage train"),
        ({"train": {"status": "running", "process": HERE}}, True, "running", "train"),
        ({"train": {"status": "running", "process": "0-1"}}, False, "running", "train"),
        ({"train": {"status": "running", "process": "x"}}, False, "running", "train"),
        ({"train": {"status": "interrupted"}}, False, "stopped", "in stage train"),
        # Of stages that the run does not ask for itself, what was done after them counts.
        ({"train": {"began": "3"}, "export": {"began": "2", "status": "failed"}}, True, "done", ""),
        (
            {"train": {"began": "1"}, "export": {"began": "2", "status": "failed"}},
            True,
            "failed",
            0,
        ),
        ({"train": {}, "export": {"began": "2", "status": "failed"}}, True, "failed", 0),
        ({"train": {"began": "1", "status": "failed"}, "chat": {"began": "2"}}, True, "failed", 0),
    ],
)
def test_how_a_run_of_several_calls_stands(tmp_path, entries, is_old, status, reason):
    filled = {name: {"status": "done", "error": "E", **entry} for name, entry in entries.items()}
    write_run(tmp_path / "a", {**RUN, "stages": filled})
    if is_old:
        make_old(tmp_path / "a")
    found = read_run(tmp_path / "a")
    assert (found.status, found.reason) == (status, found.reason if reason == 0 else reason)


def test_a_reader_that_goes_ends_it_quietly(tmp_path):
    for number in range(3):
        write_run(tmp_path / str(number))
    command = f"{sys.executable} -m medusa_exp.runs.list {tmp_path} --json | true"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", "\udcff"),
        ("run.json", {**RUN, "stages": [1]}),
        ("run.json", {**RUN, "stages": {"train": None}}),
        ("run.json", {**RUN, "created": "yesterday"}),
        ("run.json", {**RUN, "cache_keys": 3}),
        ("run.json", {**RUN, "stages": {"train": {"features": "x"}}}),
        ("run.json", "[" * 100_000),
        ("metrics.json", {"eval/speedup": "fast"}),
        ("metrics.json", '{"eval/speedup": NaN}'),
        ("heads/config.json", "nothing"),
        ("regenerated.json", "[1]"),
        (".hydra/config.yaml", "a: &x [1]\nb: *x"),
        (".hydra/config.yaml", "- 1"),
        (".hydra/config.yaml", "{"),
    ],
)
def test_what_cannot_be_read_is_a_row_with_the_reason(tmp_path, file, content, capsys):
    write_run(tmp_path / "sound")
    path = write_run(tmp_path / "broken") / file
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    statuses = {Path(run.path).name: run for run in read_runs(tmp_path)}
    assert statuses["sound"].status == "done"
    assert statuses["broken"].status == "malformed" and statuses["broken"].reason
    main([str(tmp_path)])
    assert "malformed: " in capsys.readouterr().out


def test_directories_that_are_no_runs_and_runs_inside_of_runs_are_no_rows(tmp_path):
    write_run(tmp_path / "x" / "multirun" / "now" / "0a")
    write_run(tmp_path / "x" / "multirun" / "now" / "0a" / "export")
    write_run(tmp_path / ".hidden")
    write(tmp_path / "cache" / "features" / "k" / "summary.json", {})
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [Path(run.path).name for run in read_runs(tmp_path)] == ["0a"]
    assert [run.path for run in read_runs(tmp_path / "x/multirun/now/0a")] == [
        str(tmp_path / "x/multirun/now/0a")
    ]


def test_filters_and_json(tmp_path, capsys):
    write_run(tmp_path / "a", metrics={**METRICS, "eval/speedup": 1.5})
    write_run(tmp_path / "b", {**stages(train="failed"), "name": "other"})
    make_old(tmp_path)
    for options, names in (
        ([], ["b", "a"]),
        (["--sort", "speedup"], ["b", "a"]),
        (["--status", "failed"], ["b"]),
        (["--experiment", "qu*"], ["a"]),
        (["--model", "gpt*"], []),
        (["--days", "1"], []),
        (["--heads", "medusa x5", "--status", "done"], ["a"]),
    ):
        main([str(tmp_path), "--json", *options])
        found = json.loads(capsys.readouterr().out)
        assert [Path(run["path"]).name for run in found] == names, options
    main([str(tmp_path), "--model", "gpt*"])
    assert "no run" in capsys.readouterr().out


def test_a_place_without_runs_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="is no directory"):
        main([str(tmp_path / "none")])


def test_a_table_in_a_pipe_is_text_in_one_line_a_run(tmp_path, capsys):
    write_run(tmp_path / "a")
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    [_, line] = out.splitlines()
    assert all(word in line for word in ("2026-03-01 10:00", "llama", "3.25", "2.50x", "100.0%"))


def test_sizes_are_on_disk_and_links_count_once(tmp_path):
    path = write_run(tmp_path / "a")
    before = read_run(path).bytes
    (path / "heads" / "model.safetensors").write_bytes(bytes(100_000))
    os.link(path / "heads" / "model.safetensors", path / "again")
    assert 100_000 <= read_run(path).bytes - before < 200_000
    assert isinstance(Run("x").cache_keys, dict)
