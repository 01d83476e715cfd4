"""One training in two processes, over gloo."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from sessions import session_of, untimed
from transformers import AutoModelForCausalLM

from medusa_exp.data.batching import epoch_planner
from medusa_exp.errors import Stopped, UserError
from medusa_exp.model import load_heads
from medusa_exp.runs.record import RunRecord
from medusa_exp.stages import train
from medusa_exp.stages.session import Session


def run(config, out):
    out.mkdir(exist_ok=True)
    session = Session(config, out)
    with RunRecord(out, config, []).stage("train") as session.notes:
        return train.run(config, out, session)


def steps(out):
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does_with_twice_the_micro_batches(config, tmp_path, strategy):
    config.dtype.precision = "32-true"
    config.decode.max_new_tokens, config.train.max_steps = 8, 5
    config.train.accumulate = 2
    one = run(config, tmp_path / "one")
    config.train.accumulate, config.train.strategy, config.train.devices = 1, strategy, 2
    two = run(config, tmp_path / "two")
    assert untimed(two) == pytest.approx(untimed(one), rel=1e-4) and "val/accept_length" in two
    heads = [load_heads(tmp_path / n / "heads").state_dict() for n in ("one", "two")]
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-3, atol=1e-4)
    assert steps(tmp_path / "two") == steps(tmp_path / "one")  # each line is written once
    run_json = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run_json["stages"]["train"]["resumed_from_step"] == 0
    if strategy == "fsdp":
        found = run_json["stages"]["train"]["backbone_bytes"]
        assert found["kept"] < 0.8 * found["whole"]


def test_a_bad_loss_of_one_process_stops_both(config, tmp_path):
    """The second process alone has the conversation of whose states some are NaN."""
    config.train.strategy, config.train.devices, config.train.batch_tokens = "ddp", 2, 64
    path = Path(config.dataset.path)
    tokenizer = session_of(config).tokenizer()
    documents = session_of(config).tokenized(tokenizer, 128).split("train")
    plan = epoch_planner("padded", documents.lengths, batch_tokens=64, row_tokens=128, seed=0)
    name = documents.strings("conversation_id")[plan(0)[1][0][0]]
    records = json.loads(path.read_text())
    [message] = [r["conversations"][0] for r in records if r["id"] == name]
    message["value"] = message["value"].replace("+", "@")
    path.write_text(json.dumps(records))
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    [token] = tokenizer.encode("@", add_special_tokens=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(config.model.path)
    with pytest.raises(UserError, match=f"the loss is nan at step 0, on conversations {name}: "):
        run(config, tmp_path / "run")
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 0


def test_a_process_ends_with_the_stage_that_started_it(tmp_path):
    """Who is killed gives up its lock; here it is just given up."""
    watch = "from medusa_exp.train.launch import _end_with_stage as end; import pathlib, time; "
    watch += (
        f"end(pathlib.Path({str(tmp_path / 'alive.lock')!r})); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", watch]
    with FileLock(tmp_path / "alive.lock") as alive:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.6)
            assert process.poll() is None
            alive.release()
        assert process.returncode == -signal.SIGTERM


def test_two_trainings_do_not_share_a_run_directory(config, tmp_path):
    with (
        FileLock(tmp_path / ".train.lock"),
        pytest.raises(UserError, match=rf"another process is training in {tmp_path}: wait"),
    ):
        run(config, tmp_path)


def test_a_signal_that_stops_the_processes_is_no_fault_of_theirs(config, tmp_path):
    config.train.strategy, config.train.devices, config.train.max_steps = "ddp", 2, 9999
    history = tmp_path / "run/history.jsonl"

    def stop_when_it_trains():
        while not history.is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_it_trains, daemon=True).start()
    with pytest.raises(Stopped, match="training was stopped by SIGTERM after step") as caught:
        run(config, tmp_path / "run")
    assert caught.value.number == signal.SIGTERM
