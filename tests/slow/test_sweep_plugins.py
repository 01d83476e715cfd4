"""Sweeps with the other launchers and with Optuna: `nox -s sweeps`."""

from pathlib import Path

import pytest
from cli_runs import SMOKE, medusa_exp, read

SWEEP = ["-m", *SMOKE, "stages=[pretrain,train]", "objective=val/accept_length", "logger=none"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.mark.parametrize("launcher", ["joblib", "ray", "submitit_local"])
def test_every_launcher_does_every_job(launcher, workplace):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    command = [*SWEEP, "head.num_heads=1,2", f"hydra/launcher={launcher}", f"sweep_dir={launcher}"]
    result = medusa_exp(*command, cwd=workplace)
    assert result.returncode == 0, result.stderr
    jobs = [read(path) for path in (workplace / launcher).glob("*/job.json")]
    assert [job["status"] for job in jobs] == ["done", "done"]
    assert {"head.num_heads=1", "head.num_heads=2"} < {o for job in jobs for o in job["overrides"]}


def test_optuna_looks_for_the_greatest_and_finds_its_jobs_again(workplace):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [
        *SWEEP, "head.num_heads=range(1,5)", "train.learning_rate=interval(1e-4,1e-2)",
        "hydra/sweeper=optuna_maximize", "hydra.sweeper.n_trials=3", "sweep_dir=optuna",
    ]  # fmt: skip
    result = medusa_exp(*command, cwd=workplace)
    assert result.returncode == 0, result.stderr
    jobs = [read(path) for path in (workplace / "optuna").glob("*/job.json")]
    assert len(jobs) == 3
    best = max(job["value"] for job in jobs)
    assert f"best_value: {best}" in (workplace / "optuna/optimization_results.yaml").read_text()
    again = medusa_exp(*command, cwd=workplace)
    assert again.stdout.count("done already") == 3, "the seed asks for the same jobs"


@pytest.mark.parametrize(
    ("sweeper", "objective", "wanted"),
    [
        ("optuna", "val/accept_length", "maximize"),
        ("optuna_maximize", "val/loss_head1", "minimize"),
    ],
)
def test_optuna_is_not_let_look_for_the_worst(workplace, sweeper, objective, wanted):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [
        "-m", *SMOKE, "head.num_heads=range(1,5)", f"hydra/sweeper={sweeper}", "sweep_dir=worst",
        f"objective={objective}",
    ]  # fmt: skip
    result = medusa_exp(*command, cwd=workplace, COVERAGE_PROCESS_CONFIG="")
    assert result.returncode == 1
    assert f"looks for the worst: set hydra.sweeper.direction={wanted}" in result.stderr


def test_optuna_is_not_let_look_for_what_no_stage_measures(workplace):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [
        "-m", *SMOKE, "stages=[pretrain,train]", "head.num_heads=range(1,5)", "logger=none",
        "hydra/sweeper=optuna_maximize", "sweep_dir=nothing",
    ]  # fmt: skip
    result = medusa_exp(*command, cwd=workplace, COVERAGE_PROCESS_CONFIG="")
    assert result.returncode == 1
    assert "objective=eval/speedup is a metric of stage evaluate" in result.stderr
    assert "Traceback" not in result.stderr and not list((workplace / "nothing").glob("*/"))
