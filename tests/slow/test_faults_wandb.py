"""Servers that answer W&B's uploads with errors cost a run 15 s at most, and it says what arrived.

Each run is a process of its own, for what counts is how long it takes to be gone.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_server import FAULTS, Server

MOST = 15.0
FAULTY = [*FAULTS, "refused"]
_RUN = """
import logging, sys, time
sys.path[:0] = [{tests!r}, {tests!r} + "/support"]
from pathlib import Path
from tracking.test_wandb_state import Tracker, config_of, record_of
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
with Tracker(record_of(Path({out!r}), config_of("online"))) as tracker:
    tracker.log_step("train", 1, {{"train/loss": 4.0}})
    time.sleep(5)
    tracker.stage_done("chat")
    print("DONE", time.time(), flush=True)
"""


def run(out: Path, server: Server) -> tuple[float, list[str]]:
    """Return the seconds from the end of the work to the end of the process, and its lines."""
    out.mkdir()
    home = out / "home"
    home.mkdir()
    script = _RUN.format(tests=str(Path(__file__).parents[1]), out=str(out))
    environment = {name: v for name, v in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {"HOME": str(home), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    with (out / "said.txt").open("w") as said:
        done = subprocess.run(
            [sys.executable, "-c", script], timeout=300, env=environment, stdout=said, check=False
        )
    end = time.time()
    lines = (out / "said.txt").read_text().splitlines()
    assert done.returncode == 0
    [work_done] = [float(line.split()[1]) for line in lines if line.startswith("DONE ")]
    return end - work_done, [line for line in lines if "tracking.upload" in line]


@pytest.mark.parametrize("fault", FAULTY)
def test_a_server_with_a_fault_costs_seconds_and_is_said(tmp_path, fault):
    server = Server(fault if fault in FAULTS else None)
    if fault == "refused":
        server.stop()
    try:
        extra, said = run(tmp_path / "run", server)
    finally:
        server.stop()
    assert extra <= MOST, said
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    what = "not all" if fault == "stream" else "nothing"
    assert f"{what} has reached W&B" in said[-1], said
    assert said[-1].endswith(f"`wandb sync {folder}` uploads it")
    assert not server.lines


def test_a_server_without_one_has_all(tmp_path):
    server = Server()
    try:
        extra, said = run(tmp_path / "run", server)
    finally:
        server.stop()
    assert extra <= MOST and server.lines[0]["train/loss"] == 4.0
    assert said[-1].endswith(f"W&B: {server.url}/us/heads/runs/{said[-1].rpartition('/')[2]}")
