"""How each job of a sweep stands on disk: `job.json` in its directory, and a lock beside it."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json
from medusa_exp.runs.locks import locked

log = logging.getLogger(__name__)
JOB = "job.json"
_LOCK = ".job.lock"


def read_jobs(sweep_dir: Path) -> dict[str, dict[str, Any]]:
    """Return `job.json` of each job of a sweep by directory name, in the order of their numbers.

    A job that says that it runs, and that no process holds, is "interrupted". One whose file is
    damaged is left out, with a warning.
    """
    found = {path: _read(path) for path in sweep_dir.glob(f"*/{JOB}")}
    jobs = {path.parent.name: job for path, job in found.items() if job is not None}
    for name, job in jobs.items():
        if job["status"] == "running" and not is_held(sweep_dir / name):
            job["status"] = "interrupted"
    return dict(sorted(jobs.items(), key=lambda item: (item[1]["number"], item[0])))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        job: dict[str, Any] | None = read_json(path)
    except UserError as error:
        log.warning("%s", error)
        return None
    return job


def is_held(out: Path) -> bool:
    """Say whether a process is at the job of this directory."""
    if not (out / _LOCK).is_file():  # nobody ever was, and none is to be made of any other run
        return False
    if not os.access(out, os.W_OK):  # a sweep of another user: it cannot be known
        return True
    try:
        with locked(out / _LOCK, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold a job for this process; wait while another does it.

    A sweep that was killed may leave processes that go on with their jobs.
    """
    with locked(out / _LOCK, what=f"{out}, a job that is being done"):
        yield


def is_done(out: Path) -> bool:
    """Say whether the job of this directory was done."""
    return bool(read_json(out / JOB, {}).get("status") == "done")


def objective_of(jobs: Iterable[dict[str, Any]]) -> str:
    """Return the metric that most jobs have a value of: a later call may have named another."""
    given = list(jobs)
    names = Counter(job["objective"] for job in given if job["value"] is not None)
    names.update(dict.fromkeys((job["objective"] for job in given), 0))
    return names.most_common(1)[0][0] if names else ""
