"""What launchers leave in the environment changes nothing where one device trains.

`nox -s launchers` tries all of them.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from cli_runs import SMOKE, medusa_exp
from lightning.pytorch.utilities import rank_zero_only

from medusa_exp.errors import UserError
from medusa_exp.train.launch import be_alone, refuse_other_launchers

ENVIRONMENTS = {
    "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
    "local": {"LOCAL_RANK": "1"},
    "operator": {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
        "KUBERNETES_PORT": "tcp://10.0.0.1:443",
    },
    "salloc": {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1"},
    "srun": {
        "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODELIST": "a",
    },
    "openmpi": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    "mpich": {"PMI_RANK": "1", "PMI_SIZE": "2"},
    "lsf": {
        "LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "hosts", "JSM_NAMESPACE_LOCAL_RANK": "1",
        "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "1",
    },
}  # fmt: skip
SHORT = [*SMOKE, "stages=[pretrain,train]", "logger=none"]


@pytest.fixture(scope="module")
def plain_heads(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    assert medusa_exp(*SHORT, "run_dir=run", cwd=folder).returncode == 0
    return (folder / "run/heads/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "srun" else pytest.mark.slow) for name in ENVIRONMENTS],
)
def test_heads_are_those_of_a_plain_run(name, plain_heads, tmp_path):
    result = medusa_exp(*SHORT, "run_dir=run", cwd=tmp_path, **ENVIRONMENTS[name])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/heads/model.safetensors").read_bytes() == plain_heads
    assert result.stdout.count("of the environment is ignored") == 2  # pretrain and train


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_first_and_only_process(name, monkeypatch, caplog):
    for key, value in ENVIRONMENTS[name].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with caplog.at_level("INFO"):
        be_alone()
    assert rank_zero_only.rank == 0
    assert "one device is one process" in caplog.text


@pytest.mark.parametrize("name", ["torchrun", "operator", "srun", "openmpi", "mpich", "lsf"])
def test_several_devices_are_not_started_by_each_process_of_a_launcher(name, monkeypatch):
    for key, value in ENVIRONMENTS[name].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"train\.devices=2: .*without torchrun, srun or mpirun"):
        refuse_other_launchers(2)


@pytest.mark.parametrize("name", ["salloc", "local"])
def test_a_shell_of_an_allocation_starts_several_devices(name, monkeypatch):
    for key, value in ENVIRONMENTS[name].items():
        monkeypatch.setenv(key, value)
    refuse_other_launchers(2)


@pytest.mark.slow
def test_the_signal_that_a_job_is_nearly_over_leaves_a_checkpoint(tmp_path):
    command = [*SHORT, "train.max_steps=2000", "train.val_every=2000", "run_dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "medusa_exp", *command],
        cwd=tmp_path,
        env={**os.environ, "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    history = tmp_path / "run/history.jsonl"
    for _ in range(1200):
        if history.is_file() and '"train/loss"' in history.read_text():
            break
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "was stopped by SIGUSR1" in said
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
