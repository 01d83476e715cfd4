"""The record files of a run directory."""

import json

import pytest
from cli_runs import flip

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, write_json, write_jsonl
from medusa_exp.runs.processes import is_process_alive
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking.history import HistoryLogger


def test_no_figure_outlives_its_stage_however_that_ended_between(tmp_path):
    config = Config(device="cpu")

    def run(metrics):
        record = RunRecord(tmp_path, config, ["python", "-m", "medusa_exp"])
        with record.stage("evaluate"):
            if metrics is None:
                raise RuntimeError("it fails")
            record.merge_metrics("evaluate", metrics)

    run({"eval/speedup": 1.0, "eval/tree/b4/speedup": 2.0})
    with pytest.raises(RuntimeError, match="it fails"):
        run(None)
    run({"eval/speedup": 3.0})
    assert read_json(tmp_path / "metrics.json") == {"eval/speedup": 3.0}


def test_a_stage_says_which_process_is_at_it_while_one_is(tmp_path):
    record = RunRecord(tmp_path, Config(device="cpu"), [])
    with record.stage("evaluate"):
        entry = read_json(tmp_path / "run.json")["stages"]["evaluate"]
        assert is_process_alive(entry["process"])
    assert "process" not in read_json(tmp_path / "run.json")["stages"]["evaluate"]


def test_a_second_call_at_the_same_stage_is_refused_and_changes_nothing(tmp_path):
    first, second = (RunRecord(tmp_path, Config(device="cpu"), [word]) for word in ("a", "b"))
    with first.stage("calibrate"):
        said = "another process is at stage calibrate in "
        with pytest.raises(UserError, match=said), second.stage("calibrate"):
            pytest.fail("both would write calibration.json")
        with second.stage("evaluate"):  # another stage may be run meanwhile
            pass
    stages = read_json(tmp_path / "run.json")["stages"]
    assert [stages[name]["command"] for name in ("calibrate", "evaluate")] == [["a"], ["b"]]
    with second.stage("calibrate"):
        pass


def test_a_figure_that_is_no_number_is_told_and_left_out(tmp_path, caplog):
    record = RunRecord(tmp_path, Config(device="cpu"), [])
    with record.stage("evaluate"):
        pass
    assert record.merge_metrics("evaluate", {"a": float("nan"), "b": 1.0}) == {"b": 1.0}
    assert read_json(tmp_path / "metrics.json") == {"b": 1.0}
    assert read_json(tmp_path / "run.json")["stages"]["evaluate"]["metrics"] == ["b"]
    assert "stage evaluate: not finite, and left out: a" in caplog.text


def test_a_recorded_command_has_no_password(tmp_path):
    record = RunRecord(tmp_path, Config(device="cpu"), ["evaluate.server=http://me:hunter2@host:1"])
    with record.stage("evaluate"):
        pass
    text = (tmp_path / "run.json").read_text()
    assert "evaluate.server=http://host:1" in text and "hunter2" not in text


def test_an_error_says_the_variable_and_not_its_value(tmp_path, monkeypatch):
    """The report shows it, and is sent."""
    monkeypatch.setenv("PLACE", "/secret/place")
    monkeypatch.setenv("ONE", "1")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("a: ${oc.env:PLACE}/x\nb: ${oc.env:ONE}\n")
    record = RunRecord(tmp_path, Config(device="cpu"), [])
    with pytest.raises(UserError), record.stage("evaluate"):
        raise UserError("evaluate.path=/secret/place/x does not exist: 1 try")
    error = read_json(tmp_path / "run.json")["stages"]["evaluate"]["error"]
    assert error == "UserError: evaluate.path=${oc.env:PLACE}/x does not exist: 1 try"


def test_two_calls_at_once_keep_each_others_numbers(tmp_path):
    config = Config(device="cpu")
    one, two = (RunRecord(tmp_path, config, [name]) for name in ("one", "two"))
    with one.stage("calibrate") as notes_one, two.stage("evaluate") as notes_two:
        notes_one.add_inputs(tokenised="a")
        notes_two.add_inputs(model="b")
        two.merge_metrics("evaluate", {"eval/speedup": 2.0})
        one.merge_metrics("calibrate", {"tree/num_nodes": 3.0})
    assert read_json(tmp_path / "metrics.json") == {"eval/speedup": 2.0, "tree/num_nodes": 3.0}
    run = read_json(tmp_path / "run.json")
    assert {name: stage["status"] for name, stage in run["stages"].items()} == {
        "calibrate": "done",
        "evaluate": "done",
    }
    assert run["cache_keys"] == {"tokenised": "a", "model": "b"}
    two.merge_metrics("evaluate", {})
    assert read_json(tmp_path / "metrics.json") == {"tree/num_nodes": 3.0}


def test_a_number_that_another_call_took_away_does_not_come_back(tmp_path):
    config = Config(device="cpu")
    RunRecord(tmp_path, config, []).merge_metrics("evaluate", {"eval/old": 1.0})
    long, short = RunRecord(tmp_path, config, []), RunRecord(tmp_path, config, [])
    short.merge_metrics("evaluate", {"eval/new": 2.0})
    long.merge_metrics("train", {"train/loss": 3.0})
    assert read_json(tmp_path / "metrics.json") == {"eval/new": 2.0, "train/loss": 3.0}


OTHERS = {
    "tree.json": {"parents": [-1, 0], "ranks": [-1, 7]},
    "job.json": {"number": 7, "overrides": [], "objective": "x", "status": "done", "value": 1.5},
    "data.json": {"key": "a", "sources": {"a": {"records": 7}}},
}
"""Files with a checksum of their own, besides run.json."""


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("run.json", "delete its key `check`"),
        ("history.jsonl", "run stage train again"),
        ("tree.json", "delete its key `check`"),
        ("job.json", "delete its key `check`"),
        ("data.json", "delete its key `check`"),
        ("metrics.json", "delete the keys `metrics_sha256` and `check` of run.json"),
        ("records.jsonl", "run stage evaluate again"),
    ],
)
def test_a_digit_that_has_changed_is_found(name, remedy, tmp_path):
    config = Config(device="cpu")
    record = RunRecord(tmp_path, config, [])
    HistoryLogger(tmp_path, "train").log_metrics({"train/loss": 7.0}, 1)
    with record.stage("train"):
        pass
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"stage": "train", "step": 2}\n{"half":')  # of a later call
    for of_one, value in OTHERS.items():
        write_json(tmp_path / of_one, value)
    with record.stage("evaluate") as notes:
        notes.add(widths={2: "b", 10: "a"}, pair=(1, 2))
        row = {"category": "a", "method": "tree", "batch_size": 1, "accept_lengths": [7]}
        write_jsonl(tmp_path / "records.jsonl", [row])
    record.merge_metrics("evaluate", {"eval/speedup": 1.777777})
    RunRecord(tmp_path, config, [])
    content = (tmp_path / name).read_bytes()
    if name == "run.json":  # the second digit: a number may not begin with 0
        place = content.index(key := b'"peak_memory_bytes": ') + len(key) + 1
    else:
        place = content.index(b"7")
    flip(tmp_path / name, place)
    with pytest.raises(UserError, match=f"{name} is not what was written there.*{remedy}"):
        read_json(tmp_path / name) if name in OTHERS else RunRecord(tmp_path, config, [])
    if name == "records.jsonl":  # are to be written anew
        RunRecord(tmp_path, Config(device="cpu", stages=["evaluate"]), [])


def test_what_an_older_version_has_gone_on_with_is_told_and_goes_on(tmp_path):
    """It kept the keys that it did not know, and wrote other numbers beside them."""
    config, metrics = Config(device="cpu"), {"eval/speedup": 1.0}
    RunRecord(tmp_path, config, []).merge_metrics("evaluate", metrics)
    path = tmp_path / "run.json"
    run = {**json.loads(path.read_text()), "versions": {"a": "0"}}
    path.write_text(json.dumps(run))
    write_json(tmp_path / "metrics.json", {"eval/speedup": 2.0})
    for named, keys in ((r"run\.json .*an older version.*", ["check"]), ("", ["metrics_sha256"])):
        with pytest.raises(UserError, match=f"{named}delete .*`{keys[0]}`"):
            RunRecord(tmp_path, config, [])
        for key in keys:
            del run[key]
        path.write_text(json.dumps(run))
    assert RunRecord(tmp_path, config, []).metrics == {"eval/speedup": 2.0}


def test_a_call_that_was_killed_between_two_files_is_no_damage(tmp_path, monkeypatch):
    config, record = Config(device="cpu"), RunRecord(tmp_path, Config(device="cpu"), [])
    record.merge_metrics("train", {"train/loss": 1.0})
    write = record._write

    def dies(**values):
        write(**values)
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        record.merge_metrics("train", {"train/loss": 2.0})
    RunRecord(tmp_path, config, []).merge_metrics("train", {"train/loss": 3.0})
    assert RunRecord(tmp_path, config, []).metrics == {"train/loss": 3.0}
    with RunRecord(tmp_path, config, []).stage("evaluate"):
        write_json(tmp_path / "calibration.json", {})  # of a stage that has not come to its end
