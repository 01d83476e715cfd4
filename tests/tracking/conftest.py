"""A run of every stage with W&B offline, in the home of somebody who is not to be named."""

import os
import secrets as secrets_module
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import wandb_files as written


@pytest.fixture(scope="session")
def secrets() -> tuple[str, str]:
    """A value of the environment and a key; new ones, for a diff of this file may be sent."""
    return f"canary-{uuid4().hex}", secrets_module.token_hex(20)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wandb") / "home-of-somebody"
    (path / "project").mkdir(parents=True)
    return path


@pytest.fixture(scope="session")
def medusa_exp(home, secrets) -> Callable[..., None]:
    canary, key = secrets
    environment = {
        **os.environ,
        "HOME": str(home),
        "SECRET_CANARY": canary,
        "SLURM_JOB_ID": "1",
        "SLURM_SUBMIT_DIR": f"{home}/{canary}",
        "WANDB_API_KEY": key,
    }

    def run(*arguments: str) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "medusa_exp", *arguments],
            cwd=home / "project",
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
        assert "is missing" not in result.stdout + result.stderr  # a warning of wandb_stage

    return run


@pytest.fixture(scope="session")
def run_dir(home, medusa_exp) -> Path:
    """A run in somebody's home, with a value from the environment in its config."""
    medusa_exp(
        "+experiment=smoke",
        "stages=[pretrain,inspect,train,calibrate,evaluate,report]",
        "run_dir=run",
        f"cache_dir={home}/cache",
        "tree.path=${oc.env:SECRET_CANARY}",
        "train.features=cache",
        "device=cpu",
        "logger=wandb",
        "logger.project=heads",
        "logger.group=tests",
        "logger.tags=[tiny,cpu]",
        "logger.notes='what a test found'",
    )
    return home / "project" / "run"


@pytest.fixture(scope="session")
def file(run_dir) -> Path:
    (only,) = written.run_files(run_dir)
    return only


@pytest.fixture(scope="session")
def records(file) -> list[dict]:
    return written.records(file)


@pytest.fixture(scope="session")
def summary(file) -> dict:
    return written.state(file)["summary"]
