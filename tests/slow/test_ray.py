"""Training and regeneration by two workers of Ray: `nox -s sweeps`."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from sessions import rows_of

from medusa_exp.data.examples import open_examples
from medusa_exp.errors import UserError
from medusa_exp.model import load_heads
from medusa_exp.runs.files import read_json, read_jsonl
from medusa_exp.runs.record import RunRecord
from medusa_exp.stages import regenerate, train
from medusa_exp.stages.session import Session
from medusa_exp.stages.training_inputs import open_inputs

pytest.importorskip("ray.train")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds


def run(config, out: Path) -> dict[str, float]:
    out.mkdir()
    session = Session(config, out)
    with RunRecord(out, config, []).stage("train") as session.notes:
        return train.run(config, out, session)


def workers() -> list[int]:
    """Return the processes of Ray Train on this machine that train."""
    names = {path.parent.name: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [int(pid) for pid, name in names.items() if b"RayTrainWorker" in name]


def kill_a_worker_after(step: int, out: Path, killed: list[int]) -> None:
    while max((line["step"] for line in read_jsonl(out / "history.jsonl")), default=0) < step:
        time.sleep(0.05)
    killed.append(workers()[-1])
    os.kill(killed[0], signal.SIGKILL)


def test_a_training_goes_on_from_its_checkpoint_when_a_worker_is_killed(
    config, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    config.dtype.precision = "32-true"
    config.train.devices, config.train.max_steps, config.train.checkpoint_every = 2, 60, 5
    config.train.val_every = 60
    config.train.strategy = "ddp"
    whole = run(config, tmp_path / "whole")
    config.train.strategy = "ray"
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after, args=(20, tmp_path / "ray", killed))
    killer.start()
    metrics = run(config, tmp_path / "ray")
    killer.join()
    assert killed
    entry = read_json(tmp_path / "ray/run.json")["stages"]["train"]
    assert entry["resumed_from_step"] >= 5 and entry["resumed_from_step"] % 5 == 0
    measured = {"train/tokens_per_second", "train/mfu", "train/peak_memory_gb"}  # on either way
    assert measured <= metrics.keys() == whole.keys()
    learned = metrics.keys() - measured
    assert {n: metrics[n] for n in learned} == pytest.approx(
        {n: whole[n] for n in learned}, rel=1e-5
    )
    heads = [load_heads(tmp_path / name / "heads").state_dict() for name in ("whole", "ray")]
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value)
    assert not (tmp_path / "ray/ray").exists()


def test_what_a_worker_says_is_what_the_stage_says(config, tmp_path):
    config.train.strategy, config.train.devices = "ray", 2
    config.train.learning_rate, config.train.warmup_fraction = 10.0, 0.0
    # Each step multiplies the weights by some -1,000.
    config.train.weight_decay, config.train.max_steps = 100.0, 40
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+, on conversations"):
        run(config, tmp_path / "run")


def test_workers_answer_as_one_process_does(config, tmp_path):
    config.dtype.precision = "32-true"
    config.decode.max_new_tokens = config.regenerate.max_new_tokens = 8
    config.regenerate.batch_size = 3
    found = []
    for workers in (0, 2):
        config.regenerate.workers = workers
        config.cache_dir = str(tmp_path / f"cache{workers}")
        (tmp_path / f"run{workers}").mkdir()
        regenerate.run(config, tmp_path / f"run{workers}")
        [table] = (tmp_path / f"cache{workers}/regenerated").glob("*/documents")
        found.append((table.parent.name, rows_of(open_examples(table))))
    assert found[0] == found[1] and found[0][1]


def test_what_a_worker_cannot_do_is_what_the_stage_says(config, tmp_path):
    config.regenerate.workers, config.regenerate.use_heads = 1, True
    with pytest.raises(UserError, match="holds no heads"):
        regenerate.run(config, tmp_path)


def test_workers_write_the_hidden_states_that_one_process_does(config, tmp_path):
    config.train.features, config.train.val_prompts = "cache", 0
    found = []
    for workers in (0, 2):
        config.train.feature_workers = workers
        config.cache_dir = str(tmp_path / f"cache{workers}")
        (tmp_path / f"run{workers}").mkdir()
        inputs = open_inputs(Session(config, tmp_path / f"run{workers}"))
        found.append(
            {split: [f[n] for n in range(len(f._checks))] for split, f in inputs.features.items()}
        )
    for split, documents in found[0].items():
        for (hidden_PD, teacher_P), (theirs_PD, others_P) in zip(
            documents, found[1][split], strict=True
        ):
            assert torch.equal(hidden_PD, theirs_PD) and torch.equal(teacher_P, others_P)
