"""Sweeps as a user meets them: jobs that fail, are killed, and are found again.

What takes long is marked slow; `nox -s sweeps` runs all of it.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import SMOKE, medusa_exp, read, snapshot, without_logs
from omegaconf import OmegaConf
from report_pages import Page
from wandb_files import of_type, run_files
from wandb_files import records as written_records
from wandb_files import state as written_state

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.runs import sweep as sweep_module
from medusa_exp.runs.record import RunRecord

SWEEP = [
    "-m", *SMOKE, "stages=[pretrain,train]", "head.num_heads=1,17,3", "sweep_dir=sweep",
    "objective=val/accept_length", "logger=wandb",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def sweep(workplace) -> tuple[list[Path], subprocess.CompletedProcess[str]]:
    """The directories of three jobs, of which the second fails, and what the sweep said."""
    result = medusa_exp(*SWEEP, cwd=workplace, COVERAGE_PROCESS_CONFIG="")
    jobs = [path.parent for path in (workplace / "sweep").glob("*/job.json")]
    return sorted(jobs, key=lambda job: read(job / "job.json")["number"]), result


def test_a_sweep_goes_on_when_a_job_fails_and_says_so(sweep, workplace):
    jobs, result = sweep
    assert result.returncode == 1
    assert "head.num_heads=17 is out of range" in result.stderr
    assert [read(job / "job.json")["status"] for job in jobs] == ["done", "failed", "done"]
    values = [read(job / "job.json")["value"] for job in jobs]
    assert values == [
        read(jobs[0] / "metrics.json")["val/accept_length"],
        None,
        read(jobs[2] / "metrics.json")["val/accept_length"],
    ]
    text = " ".join(Page((workplace / "sweep/report.html").read_text()).text.split())
    assert "2 done, 1 failed" in text and "head.num_heads=17 is out of range" in text
    assert result.stdout.rstrip().endswith("report: sweep/report.html")


def test_jobs_of_a_sweep_share_the_pretrained_model_and_a_group(sweep):
    jobs, result = sweep
    done = [jobs[0], jobs[2]]
    [first, second] = files = [file for job in done for file in run_files(job)]
    assert [written_state(file)["state"] for file in files] == ["finished", "finished"]
    opened = [run for file in (first, second) for run in of_type(written_records(file), "run")]
    assert opened[0]["run_id"] != opened[1]["run_id"]
    assert {run["run_group"] for run in opened} == {"smoke/sweep"}
    assert [read(job / "heads/config.json")["num_heads"] for job in done] == [1, 3]
    assert len({read(job / "run.json")["cache_keys"]["model"] for job in done}) == 1
    assert "the pretrained model is in the cache" in result.stdout


def test_a_sweep_started_again_does_only_what_is_not_done(sweep, workplace):
    jobs, _ = sweep
    before = [without_logs(snapshot(job)) for job in jobs]
    result = medusa_exp(*SWEEP, cwd=workplace, COVERAGE_PROCESS_CONFIG="")
    assert result.stdout.count("done already") == 2
    after = [without_logs(snapshot(job)) for job in jobs]
    assert (after[0], after[2]) == (before[0], before[2])
    assert [read(job / "job.json")["attempts"] for job in jobs] == [1, 2, 1]


def test_a_finished_sweep_is_ranked_by_another_metric_without_running_again(sweep, workplace):
    jobs, _ = sweep
    others = [word for word in SWEEP if not word.startswith("objective=")]
    command = [*others, "head.num_heads=1,3"]  # without the job that fails
    mistaken = medusa_exp(
        *command, "objective=train/los", cwd=workplace, COVERAGE_PROCESS_CONFIG=""
    )
    assert mistaken.returncode == 1
    assert "objective=train/los is no metric of any stage: did you mean" in mistaken.stderr
    other = medusa_exp(*command, "objective=eval/speedup", cwd=workplace)
    assert other.stdout.count("objective=eval/speedup is no metric that these stages measure") == 2
    result = medusa_exp(*command, "objective=train/loss", cwd=workplace)
    assert result.returncode == 0 and result.stdout.count("done already") == 2, result.stderr
    done = [jobs[0], jobs[2]]
    losses = [read(job / "metrics.json")["train/loss"] for job in done]
    assert [read(job / "job.json")["value"] for job in done] == losses
    text = " ".join(Page((workplace / "sweep/report.html").read_text()).text.split())
    assert "is the best train/loss" in text


def test_a_sweep_whose_stages_do_not_measure_its_objective_begins_no_job(tmp_path):
    command = ["-m", *SMOKE, "stages=[pretrain,train]", "head.num_heads=1,2", "sweep_dir=sweep"]
    refused = medusa_exp(*command, cwd=tmp_path)
    assert refused.returncode == 1 and not (tmp_path / "sweep").exists()
    said = "objective=eval/speedup is a metric of stage evaluate, which stages=[pretrain,train]"
    assert said in refused.stderr and "Set objective=val/accept_length" in refused.stderr


@pytest.mark.parametrize(
    ("task", "others"),
    [
        ([], {"stages": ["evaluate"]}),
        ([], {"stages": ["export"]}),  # which measures nothing
        (["stages=[train],[evaluate]"], {}),
        (["objective=val/accept_length,train/loss"], {}),
        (["+experiment=a,b"], {}),
        ([], {"rerun": {"source": "x"}}),  # it has that run's stages
        ([], {"hydra": {"sweeper": {"params": {"stages": "[train],[evaluate]"}}}}),
    ],
)
def test_what_the_jobs_of_a_sweep_may_measure_is_let_pass(tmp_path, task, others):
    hydra = {"overrides": {"task": task}, "sweeper": {}, "sweep": {"dir": str(tmp_path)}}
    config = {"objective": "eval/speedup", "stages": ["train"], "rerun": {"source": None}}
    base = OmegaConf.create({**config, "hydra": hydra})
    sweep_module._check_objective(OmegaConf.merge(base, others))
    with pytest.raises(UserError, match="a metric of stage evaluate"):
        sweep_module._check_objective(
            OmegaConf.merge(base, {"hydra": {"overrides": {"task": ["seed=1,2", "name=x"]}}})
        )


@pytest.mark.slow
def test_a_sweep_knows_what_a_later_call_of_a_job_has_found(sweep, workplace):
    job = sweep[0][0]
    metrics = read(job / "metrics.json")
    found = metrics | {read(job / "job.json")["objective"]: 0.125}
    RunRecord(job, Config(), []).merge_metrics("train", found)
    result = medusa_exp("stages=[report]", f"run_dir={job}", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert read(job / "job.json")["value"] == 0.125
    assert "0.125" in Page((workplace / "sweep/report.html").read_text()).text
    RunRecord(job, Config(), []).merge_metrics("train", metrics)


@pytest.mark.slow
def test_heads_of_another_run_are_decoded_over_trees_of_several_sizes(sweep, workplace):
    result = medusa_exp(
        *SMOKE, "+sweep=tree_size", f"heads_from={sweep[0][2]}", "sweep_dir=trees",
        "tree.num_nodes=1,4", "evaluate.num_prompts=1", cwd=workplace,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    jobs = [path.parent for path in (workplace / "trees").glob("*/job.json")]
    assert sorted(len(read(job / "tree.json")["parents"]) for job in jobs) == [1, 4]
    weights = (sweep[0][2] / "heads/model.safetensors").read_bytes()
    assert all((job / "heads/model.safetensors").read_bytes() == weights for job in jobs)
    again = medusa_exp("stages=[report]", f"run_dir={jobs[0]}", cwd=workplace)
    assert again.returncode == 0, again.stderr
    assert len(list((workplace / "trees").glob("*/job.json"))) == 2, "a stage, not a sweep, again"
    assert (jobs[0] / ".hydra-2").is_dir()


@pytest.mark.slow
def test_a_run_done_again_in_a_sweep_is_judged_as_it_was(sweep, workplace):
    again = ["+experiment=rerun", f"rerun.source={sweep[0][0]}", "logger=none"]
    result = medusa_exp("-m", *again, "seed=0", "sweep_dir=again", cwd=workplace)
    assert result.returncode == 0, result.stderr
    [job] = [read(path) for path in (workplace / "again").glob("*/job.json")]
    assert job["objective"] == "val/accept_length"
    assert job["value"] == read(sweep[0][0] / "metrics.json")["val/accept_length"]


@pytest.mark.slow
def test_a_killed_sweep_on_ray_does_every_job_once(workplace):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    command = [
        "-m", *SMOKE, "stages=[pretrain,train]", "train.max_steps=40", "head.num_heads=1,2,3,4",
        "sweep_dir=killed", "objective=val/accept_length", "logger=none", "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "medusa_exp", *command],
        cwd=workplace,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(3600):
            if "done" in statuses(workplace / "killed"):
                break
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        else:
            pytest.fail("no job was done within three minutes")
    finally:
        process.kill()
        process.wait()
    at_kill = statuses(workplace / "killed")
    result = medusa_exp(*command, cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert statuses(workplace / "killed") == ["done"] * 4
    jobs = [read(path) for path in (workplace / "killed").glob("*/job.json")]
    assert len({tuple(job["overrides"]) for job in jobs}) == 4
    assert sum(job["attempts"] for job in jobs) <= 4 + at_kill.count("running")


@pytest.mark.parametrize(
    ("number", "stage", "wandb_exit"),
    [(signal.SIGINT, "train", 255), (signal.SIGTERM, "pretrain", 1)],
)
def test_a_signal_ends_the_sweep_and_not_only_its_job(workplace, number, stage, wandb_exit):
    pretraining_steps = 9999 if stage == "pretrain" else 4
    process = subprocess.Popen(
        [
            sys.executable, "-m", "medusa_exp", "-m", *SMOKE, "stages=[pretrain,train]",
            "head.num_heads=1,2", f"sweep_dir={stage}", "objective=train/loss",
            "logger=wandb", "logger.artifacts=false", "train.max_steps=9999",
            f"model.pretrain.max_steps={pretraining_steps}",
        ],
        cwd=workplace,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(2400):
            rows = [path.read_text() for path in (workplace / stage).glob("*/history.jsonl")]
            if any(f'"stage": "{stage}"' in row for row in rows):
                break
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    [job] = [path.parent for path in (workplace / stage).glob("*/job.json")]
    assert read(job / "job.json")["status"] == "interrupted"
    assert written_state(run_files(job)[0])["exit_code"] == wandb_exit


def statuses(sweep_dir: Path) -> list[str]:
    return [read(path)["status"] for path in sweep_dir.glob("*/job.json")]
