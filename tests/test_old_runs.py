"""Runs that commit 9ce118e left still go on: one that was done, and a training that was killed.

What that commit wrote lies in tests/golden/run_of_9ce118e, but for reports and logs.
"""

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import medusa_exp, read, snapshot

OLD = Path(__file__).with_name("golden") / "run_of_9ce118e"


@pytest.fixture
def place(tmp_path) -> Path:
    """Return a folder as that commit has left it, which one may write to."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "cache").rename(tmp_path / "outputs" / "cache")
    return tmp_path


def test_a_run_that_was_done_is_evaluated_again(place):
    old = read(place / "done/metrics.json")
    heads = snapshot(place / "done/heads")
    done = medusa_exp("stages=[evaluate]", "run_dir=done", "tree=chain", cwd=place)
    assert done.returncode == 0, done.stderr
    new = read(place / "done/metrics.json")
    assert set(old) <= set(new)
    for name in ("eval/backbone_nats_per_token", "eval/num_prompts", "eval/identical_fraction"):
        assert new[name] == pytest.approx(old[name], rel=1e-4)
    now = snapshot(place / "done/heads")
    assert heads.items() <= now.items()
    assert [Path(name).name for name in now.keys() - heads.keys()] == ["README.md"]  # its card


def test_a_training_that_was_killed_goes_on(place):
    run = read(place / "half/run.json")
    run["data"]["of/another/call.json"] = "0" * 64  # such as stage evaluate with other data
    (place / "half/run.json").write_text(json.dumps(run))
    done = medusa_exp("stages=[train]", "run_dir=half", cwd=place)
    assert done.returncode == 0, done.stderr
    entry = read(place / "half/run.json")["stages"]["train"]
    assert entry["resumed_from_step"] == 20
    assert read(place / "half/metrics.json")["train/steps"] == 300
    assert (place / "half/heads/model.safetensors").is_file()


def test_a_report_makes_no_data(place):
    shutil.rmtree(place / "outputs")
    done = medusa_exp("stages=[report]", "run_dir=done", cwd=place)
    assert done.returncode == 0, done.stderr
    assert not (place / "outputs").exists()
    assert "data" not in done.stderr
