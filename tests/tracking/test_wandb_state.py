"""How a W&B run begins and ends: exit states, crashes, modes, networks, and what it may not say."""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import wandb_files as written
from lightning.pytorch.utilities.exceptions import SIGTERMException
from wandb_files import of_type
from wandb_server import Server

from medusa_exp.config import Config, LoggerConfig, TrainConfig
from medusa_exp.errors import Stopped, UserError
from medusa_exp.runs.files import read_json, write_json, write_jsonl
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking import upload, wandb_artifacts, wandb_run
from medusa_exp.tracking.tracker import Tracker
from medusa_exp.tracking.wandb_run import _finish, best_values


def config_of(mode: str = "offline", **keys) -> Config:
    logger = LoggerConfig(mode=mode, project="heads", artifacts=False)
    return Config(name="state", stages=["chat"], device="cpu", logger=logger, **keys)


def record_of(out: Path, config: Config) -> RunRecord:
    record = RunRecord(out, config, ["python", "-m", "medusa_exp"])
    record.run["stages"]["chat"] = {"metrics": ["chat/tokens_per_step"]}
    record.metrics = {"chat/tokens_per_step": 2.5}
    return record


def only_file(out: Path) -> Path:
    (file,) = written.run_files(out)
    return file


@pytest.mark.parametrize(
    ("error", "exit_code", "state"),
    [
        (None, 0, "finished"),
        (SystemExit(0), 0, "finished"),
        (RuntimeError("no"), 1, "failed"),
        (UserError("no"), 1, "failed"),
        (KeyboardInterrupt(), 255, "failed"),
        (Stopped("no", signal.SIGINT), 255, "failed"),
        (SIGTERMException(), 1, "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_a_run_ends_in_the_state_it_deserves(tmp_path, error, exit_code, state):
    import wandb

    config = config_of()
    with (
        pytest.raises(type(error)) if error else nullcontext(),
        Tracker(record_of(tmp_path, config)) as tracker,
    ):
        assert wandb.run is tracker.run and os.environ["WANDB_DATA_DIR"] == f"{tmp_path}/wandb"
        if error is not None:
            raise error
    assert "WANDB_DATA_DIR" not in os.environ
    assert wandb.run is None, "the next job of a sweep would log to this one"
    found = written.state(only_file(tmp_path))
    assert (found["exit_code"], found["state"]) == (exit_code, state)


_KILLED = """
import os, signal, sys, time
sys.path[:0] = [{tests!r}, {tests!r} + "/support"]
from pathlib import Path
from tracking.test_wandb_state import Tracker, config_of, record_of, write_json
out, config = Path({out!r}), config_of()
record = record_of(out, config)
with Tracker(record) as tracker:
    write_json(out / "run.json", record.run)
    tracker.run.log({{"train/step": 1, "train/loss": 4.0}})
    tracker.run.log({{"train/step": 2, "train/loss": 3.0, "the_last": 1}})
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    while b"the_last" not in file.read_bytes():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_the_same_run_goes_on(tmp_path):
    script = _KILLED.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path))
    environment = {name: v for name, v in os.environ.items() if name != "WANDB_SERVICE"}
    # No pipes: W&B's process would hold them open.
    killed = subprocess.run([sys.executable, "-c", script], timeout=120, env=environment)
    assert killed.returncode == -signal.SIGKILL
    config = config_of()
    with Tracker(record_of(tmp_path, config)) as tracker:
        tracker.run.log({"train/step": 3, "train/loss": 2.0})
    first, second = (written.records(file) for file in written.run_files(tmp_path))
    ids = {of_type(found, "run")[0]["run_id"] for found in (first, second)}
    assert ids == {read_json(tmp_path / "run.json")["wandb"]["id"]}
    assert of_type(second, "run")[0]["resume"]
    losses = [
        h["item"]["train/loss"] for found in (first, second) for h in of_type(found, "history")
    ]
    assert losses == [4.0, 3.0, 2.0]
    assert not of_type(first, "exit")
    assert [record["exit_code"] for record in of_type(second, "exit")] == [0]


def test_a_job_stays_in_its_sweep_s_group(tmp_path):
    for group in ("smoke/sweep", None):
        config = config_of()
        config.logger.group = group
        record = record_of(tmp_path, config)
        with Tracker(record):
            write_json(tmp_path / "run.json", record.run)
        time.sleep(1.0)  # W&B names its folders by the second
    found = [of_type(written.records(file), "run")[0] for file in written.run_files(tmp_path)]
    assert [run["run_group"] for run in found] == ["smoke/sweep"] * 2


_BY_AN_AGENT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/support"]
from pathlib import Path
from tracking.test_wandb_state import Tracker, config_of, record_of, write_json
out, config = Path({out!r}), config_of()
record = record_of(out, config)
with Tracker(record):
    write_json(out / "run.json", record.run)
"""


def test_an_agent_of_a_wandb_sweep_finds_its_run(tmp_path):
    script = _BY_AN_AGENT.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path))
    agent = {"WANDB_SWEEP_ID": "abcd1234", "WANDB_RUN_ID": "from-agent"}
    environment = {name: v for name, v in os.environ.items() if name != "WANDB_SERVICE"}
    subprocess.run(
        [sys.executable, "-c", script], timeout=120, env={**environment, **agent}, check=True
    )
    [file] = written.run_files(tmp_path)
    [run] = of_type(written.records(file), "run")
    assert (run["run_id"], run["sweep_id"]) == ("from-agent", "abcd1234")
    assert read_json(tmp_path / "run.json")["wandb"]["id"] == "from-agent"


def test_disabled_writes_and_imports_nothing(tmp_path):
    config = config_of("disabled")
    with Tracker(record_of(tmp_path, config)) as tracker:
        tracker.stage_done("chat")
    assert tracker.run is None and not (tmp_path / "wandb").exists()


def test_what_other_processes_trained_is_drawn_too(tmp_path):
    config = config_of(train=TrainConfig(strategy="ddp", devices=2))
    record = record_of(tmp_path, config)
    record.metrics = {"train/loss": 3.0}
    write_jsonl(
        tmp_path / "history.jsonl", [{"stage": "pretrain", "step": 1, "pretrain/loss": 9.0}]
    )
    rows = [{"stage": "train", "step": step, "train/loss": 5.0 - step} for step in (1, 2)]
    with Tracker(record) as tracker:
        with (tmp_path / "history.jsonl").open("a") as file:
            file.writelines(f"{row}\n".replace("'", '"') for row in rows)
        write_json(tmp_path / "data.json", {})
        tracker.stage_done("train")
    history = of_type(written.records(only_file(tmp_path)), "history")
    drawn = [(row["item"].get("train/step"), row["item"].get("train/loss")) for row in history]
    assert drawn[:2] == [(1, 4.0), (2, 3.0)]
    assert not any("pretrain/loss" in row["item"] for row in history)


def test_a_picture_that_fails_costs_no_number(tmp_path, monkeypatch, caplog):
    def fail(out, stage):
        raise ValueError("no such font")

    monkeypatch.setattr(wandb_run, "media", fail)
    config = config_of()
    with Tracker(record_of(tmp_path, config)) as tracker:
        tracker.stage_done("chat")
    assert "artifact of stage chat is missing" in caplog.text
    found = written.state(only_file(tmp_path))
    assert found["exit_code"] == 0 and found["summary"]["chat/tokens_per_step"] == 2.5


@pytest.fixture
def account(tmp_path_factory, monkeypatch):
    """An empty home; W&B reads it, and the environment, when it is set up."""
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def server(account):
    server = Server()
    account.setenv("WANDB_BASE_URL", server.url)
    account.setenv("WANDB_API_KEY", "a" * 40)
    yield server
    server.stop()


def test_online_all_is_there_when_the_run_ends(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    config = config_of("online")
    with Tracker(record_of(tmp_path, config)) as tracker:
        tracker.run.log({"train/step": 1, "train/loss": 4.0})
        tracker.stage_done("chat")
    assert server.lines[0]["train/loss"] == 4.0
    assert server.summary["chat/tokens_per_step"] == 2.5
    assert server.runs[0]["name"] == tracker.run.id and server.runs[0]["project"] == "heads"
    assert f"W&B: {server.url}/us/heads/runs/{tracker.run.id}" in caplog.text


@pytest.mark.parametrize("is_dead_from_the_start", [True, False])
def test_online_a_dead_network_costs_a_warning(tmp_path, server, caplog, is_dead_from_the_start):
    if is_dead_from_the_start:
        server.stop()
    config = config_of("online")
    with Tracker(record_of(tmp_path, config)) as tracker:
        tracker.run.log({"train/step": 1, "train/loss": 4.0})
        if not is_dead_from_the_start:
            server.stop()
        tracker.stage_done("chat")
    (warning,) = [line for line in caplog.messages if "has reached W&B" in line]
    assert f"`wandb sync {only_file(tmp_path).parent}`" in warning
    found = written.state(only_file(tmp_path))
    assert found["summary"]["chat/tokens_per_step"] == 2.5
    assert found["summary"]["train/loss"] == 4.0 and found["exit_code"] == 0


def test_online_what_a_server_refuses_is_said(tmp_path, account, caplog):
    """W&B's program ends well then. More such servers are in tests/slow/test_faults_wandb.py."""
    server = Server("page")
    account.setenv("WANDB_BASE_URL", server.url)
    account.setenv("WANDB_API_KEY", "a" * 40)
    with Tracker(record_of(tmp_path, config_of("online"))) as tracker:
        tracker.stage_done("chat")
    server.stop()
    (warning,) = [line for line in caplog.messages if "nothing has reached W&B" in line]
    assert warning.endswith(f"`wandb sync {only_file(tmp_path).parent}` uploads it")
    assert "invalid character '<'" in warning


def test_a_fault_of_the_upload_of_code_or_steps_ends_no_run(tmp_path, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise RuntimeError("W&B is gone")

    monkeypatch.setattr(wandb_artifacts, "log_code", fail)
    config = config_of()
    config.logger.artifacts = True
    with Tracker(record_of(tmp_path, config)) as tracker:
        monkeypatch.setattr(tracker.run, "log", fail)
        for step in (1, 2):
            tracker.log_step("train", step, {"train/loss": 1.0})
    assert "W&B lacks this run's code" in caplog.text
    assert caplog.text.count("W&B lacks steps") == 1


def test_online_without_a_key_is_refused(tmp_path, account):
    config = config_of("online")
    with (
        pytest.raises(UserError, match=r"logger.mode=online: .*logger.mode=offline"),
        Tracker(record_of(tmp_path, config)),
    ):
        pass
    assert not (tmp_path / "wandb").exists()


def test_an_upload_ends_with_the_run_that_was_killed(tmp_path, server):
    """Else W&B's program would wait for ever for the rest of the file."""
    file = tmp_path / "run-1.wandb"
    file.touch()
    script = (
        "import sys, os, signal; from pathlib import Path\n"
        "from medusa_exp.tracking.upload import Upload\n"
        f"upload = Upload(Path({str(tmp_path)!r}))\n"
        "print(upload._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    started = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    folder = Path(f"/proc/{int(started.stdout)}")
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists()


def test_an_upload_that_never_says_a_word_has_had_its_time_since_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_PATIENCE", 0.2)
    monkeypatch.setattr(upload, "_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(upload, "_is_reachable", lambda: True)
    process = MagicMock(**{"poll.return_value": None})
    monkeypatch.setattr(upload.subprocess, "Popen", lambda *given, **options: process)
    mute = upload.Upload(tmp_path)
    mute._started -= 31  # the run has taken so long
    start = time.monotonic()
    mute._wait()
    assert process.poll.called and 0.2 < time.monotonic() - start < 5


def test_an_upload_ends_where_the_run_cannot_be_finished(tmp_path, caplog):
    run, beside = MagicMock(dir=str(tmp_path / "run" / "files")), MagicMock()
    run.finish.side_effect = ConnectionResetError("Connection lost")
    _finish(run, beside, None)
    beside.finish.assert_called_once_with()
    assert f"Connection lost; `wandb sync {tmp_path / 'run'}`" in caplog.text


def test_best_values_know_which_end_is_better():
    rows = [
        {
            "stage": "train",
            "step": 1,
            "val/top1_head1": 0.5,
            "val/loss_head1": 3.0,
            "train/loss": 9,
        },
        {"stage": "train", "step": 2, "val/top1_head1": 0.4, "val/loss_head1": 2.0},
        {"stage": "train", "step": 3, "val/top1_head1": float("nan"), "val/accept_length": 1.5},
    ]
    assert best_values(rows) == {
        "best/val/top1_head1": 0.5,
        "best/val/loss_head1": 2.0,
        "best/val/accept_length": 1.5,
    }
