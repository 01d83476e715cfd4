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

TOKENS = (
    *(
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "OPENAI_API_KEY",
        "ANTHROPIC_API_KEY",
        "GEMINI_API_KEY",
    ),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET"),
    *("GOOGLE_API_KEY", "GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN", "CI_JOB_TOKEN", "NPM_TOKEN"),
    *("DOCKER_PASSWORD", "SLACK_TOKEN", "SLACK_WEBHOOK", "COMET_API_KEY", "NEPTUNE_API_TOKEN"),
    *("MLFLOW_TRACKING_PASSWORD", "CLEARML_API_SECRET_KEY", "KAGGLE_KEY", "REPLICATE_API_TOKEN"),
    *("COHERE_API_KEY", "MISTRAL_API_KEY", "TOGETHER_API_KEY", "GROQ_API_KEY", "VLLM_API_KEY"),
    *("PGPASSWORD", "MYSQL_PWD", "REDIS_PASSWORD", "VAULT_TOKEN", "KUBE_TOKEN", "SENTRY_AUTH"),
    *(
        "RAY_ADDRESS_TOKEN",
        "SLURM_JWT",
        "PASSWORD",
        "SECRET",
        "MY_PRIVATE_THING",
        "lowercase_secret",
    ),
    *("UNUSUAL-NAME", "SSH_ASKPASS_ANSWER", "TWINE_PASSWORD", "PIP_TRUSTED"),
)
URLS = ("DATABASE_URL", "PIP_INDEX_URL", "SENTRY_DSN", "http_proxy", "HTTPS_PROXY", "ALL_PROXY")
"""Variables that hold the address of something, with user and password."""
FILES = (
    *(".netrc", ".git-credentials", ".ssh/id_ed25519", ".aws/credentials", ".kube/config"),
    *(".cache/huggingface/token", ".config/gh/hosts.yml", ".docker/config.json", ".pypirc"),
)
"""In the home directory."""


@pytest.fixture(scope="session")
def secrets() -> tuple[str, ...]:
    """A value of the environment, a key, and one for each of the above and for git's remote; new
    ones, for a diff of this file may be sent."""
    others = [f"p@ss-{uuid4().hex}" for _ in (*TOKENS, *URLS, *FILES, "remote")]
    return f"canary-{uuid4().hex}", secrets_module.token_hex(20), *others


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wandb") / "home-of-somebody"
    (path / "project").mkdir(parents=True)
    return path


@pytest.fixture(scope="session")
def medusa_exp(home, secrets) -> Callable[..., None]:
    canary, key, *others = secrets
    of_tokens, of_urls = others[: len(TOKENS)], others[len(TOKENS) :]
    of_files, remote = of_urls[len(URLS) : -1], of_urls[-1]
    for name, secret in zip(FILES, of_files, strict=True):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"machine x login y password {secret}\n")
    environment = {
        **os.environ,
        **dict(zip(TOKENS, of_tokens, strict=True)),
        **{
            name: f"http://me:{secret}@127.0.0.1:9"
            for name, secret in zip(URLS, of_urls, strict=False)
        },
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "remote.origin.url",
        "GIT_CONFIG_VALUE_0": f"https://me:{remote}@git.test/medusa",
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
