"""The smoke experiment on Linux as if it were elsewhere: `nox -s elsewhere`."""

from pathlib import Path

import pytest
from cli_runs import SMOKE, medusa_exp, read

PLANT = Path(__file__).parents[1] / "support" / "elsewhere"
CONDITIONS = {
    "no_onednn": "",  # torch for Apple silicon
    "resource": "",  # Windows has none of these
    "fcntl": "",
    "pwd": "",
    "pyarrow": "",  # an extra
    "sched_getaffinity": "",
    "posix_fallocate": "",  # macOS
    "spawn": "",
    "forkserver": "",  # Python 3.14's default
    "nobody": "this user has no home directory",  # containers started with a bare user id
    "no_locks": "has no locks",  # network file systems
}
"""What is different -> what is said of it."""


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_run_ends_with_heads_and_a_report(tmp_path, condition):
    found = medusa_exp(
        *(*SMOKE, "train.features=cache", "dataset.num_workers=2", "run_dir=run"),
        cwd=tmp_path,
        ELSEWHERE=condition,
        PYTHONPATH=str(PLANT),
    )
    said = found.stdout + found.stderr
    assert found.returncode == 0 and "Traceback" not in said, said[-3000:]
    assert CONDITIONS[condition] in said
    for name in ("heads/model.safetensors", "tree.json", "report.html"):
        assert (tmp_path / "run" / name).is_file()
    assert read(tmp_path / "run" / "metrics.json")["eval/identical_fraction"] == 1
