"""A sweep measured: twelve settings of heads on Ray, against twelve runs from nothing.

    python benchmarks/sweep.py FOLDER [--from-nothing 2] [--json FILE]

Both pretrain the model of from_scratch, let it write its own answers, and train heads that are
judged by val/accept_length. From nothing each run does all of it; so many of the twelve are run,
evenly spread over the settings, and stand for the rest. The sweep does what is shared once, in its
first call, which counts; then Ray runs the trainings, one to a core.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import Row, machine, show, write

SETTINGS = {
    "head.num_heads": ["3", "5", "8"],
    "head.num_layers": ["1", "2"],
    "train.learning_rate": ["3.0e-3", "7.0e-3"],
}
EXPERIMENT = ["+experiment=from_scratch", "objective=val/accept_length", "logger=csv", "device=cpu"]
SHARED = "stages=[pretrain,regenerate]"
TRAINING = "stages=[pretrain,regenerate,train,report]"


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new one: both begin without a cache")
    parser.add_argument("--from-nothing", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    here = machine()
    arguments.folder.mkdir()
    shared, trainings = sweep(arguments.folder)
    values = [
        json.loads(path.read_text())["value"] for path in arguments.folder.glob("s/*/job.json")
    ]
    alone = from_nothing(arguments.folder, arguments.from_nothing)
    row = Row(
        "twelve runs from nothing, over the sweep",
        "s",
        shared + trainings,
        ">= 4x",
        12 * statistics.mean(alone) / (shared + trainings) >= 4,
        reference=12 * statistics.mean(alone),
        ratio=12 * statistics.mean(alone) / (shared + trainings),
        details={
            "what is shared": shared,
            "trainings on Ray": trainings,
            "runs from nothing": alone,
            "jobs done": len(values),
            "val/accept_length": [min(values), max(values)],
        },
    )
    show([row], here)
    if arguments.json:
        write(arguments.json, [row], here)


def sweep(folder: Path) -> tuple[float, float]:
    """Return the seconds of what is shared, and of the trainings."""
    cache = f"cache_dir={folder.absolute()}/cache"
    shared = run(folder, EXPERIMENT, SHARED, cache, "run_dir=shared")
    swept = [f"{key}={','.join(values)}" for key, values in SETTINGS.items()]
    ray = ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]
    return shared, run(folder, ["-m", *EXPERIMENT], TRAINING, cache, "sweep_dir=s", *swept, *ray)


def from_nothing(folder: Path, count: int) -> list[float]:
    """Return the seconds of so many of the twelve runs, each with a cache of its own."""
    all_settings = list(itertools.product(*SETTINGS.values()))
    chosen = [all_settings[i * (len(all_settings) - 1) // max(count - 1, 1)] for i in range(count)]
    seconds = []
    for number, values in enumerate(chosen):
        settings = [f"{key}={value}" for key, value in zip(SETTINGS, values, strict=True)]
        places = [f"cache_dir={folder.absolute()}/cache{number}", f"run_dir=alone{number}"]
        seconds.append(run(folder, EXPERIMENT, TRAINING, *places, *settings))
    return seconds


def run(folder: Path, command: list[str], *more: str) -> float:
    """Run the command line in `folder`; return the seconds that it took."""
    start = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        subprocess.run(
            [sys.executable, "-m", "medusa_exp", *command, *more],
            cwd=folder,
            stdout=log,
            stderr=log,
            check=True,
        )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
