"""What W&B costs a training step: offline against disabled, in turns, in one process.

    python benchmarks/wandb_overhead.py [--rounds 7] [--steps 150] [--out FILE]

Heads of a small random Llama learn from cached hidden states: a step without a backbone is the
shortest that there is, and what is logged beside it weighs the most. A step's time is from its
start to the next one's, so what happens between steps counts; the best round of each side is
compared, by the processor's time (of this process and W&B's beside it) and on the wall. Both
need an idle machine. The last row does not: what `run.log`, W&B's threads and its process used of
the processor during the steps with W&B, added to the shortest step without.
"""

import argparse
import logging
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.callbacks import RichProgressBar
from measuring import Row, machine, show, write
from train import Case, build_case, features_of

from medusa_exp.config import LoggerConfig
from medusa_exp.model import build_heads
from medusa_exp.runs.record import RunRecord
from medusa_exp.stages.train import build_module
from medusa_exp.tracking.tracker import Tracker
from medusa_exp.train.trainer import build_trainer

_WARM_UP = 10


_in_log = 0.0
"""Processor seconds that calls of `run.log` have taken."""


def children_seconds() -> float:
    """Return what this process' living children have used of the processor: W&B's is the one."""
    seconds = 0.0
    for thread in threading.enumerate():
        children = Path(f"/proc/self/task/{thread.native_id}/children")
        for child in children.read_text().split() if children.is_file() else []:
            seconds += _used(Path(f"/proc/{child}/stat"))
    return seconds


def wandb_seconds() -> float:
    """Return what W&B has used of the processor, in this process and its own."""
    threads = [t.native_id for t in threading.enumerate() if t.name.startswith("wandb")]
    here = sum(_used(Path(f"/proc/self/task/{number}/stat")) for number in threads)
    return _in_log + here + children_seconds()


def _used(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


_CLOCKS: dict[str, Callable[[], float]] = {
    "processor": lambda: time.process_time() + children_seconds(),
    "wall": time.perf_counter,
    "wandb": wandb_seconds,
}


def time_log() -> None:
    """Add up what `run.log` takes from now on."""
    log = wandb.Run.log

    def timed(*arguments: Any, **keys: Any) -> None:
        global _in_log
        start = time.thread_time()
        log(*arguments, **keys)
        _in_log += time.thread_time() - start

    wandb.Run.log = timed  # type: ignore[method-assign]


class Clocks(L.Callback):
    """Look at the clocks when the first step starts that counts, and when the last one does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look."""
        if batch_idx in (_WARM_UP, self.steps - 1):
            self.seen.append({name: clock() for name, clock in _CLOCKS.items()})

    def milliseconds(self) -> dict[str, float]:
        """Return a step's, by each clock."""
        first, last = self.seen
        number = self.steps - 1 - _WARM_UP
        return {name: 1000 * (last[name] - first[name]) / number for name in _CLOCKS}


def train(case: Case, mode: str, steps: int, out: Path) -> dict[str, float]:
    """Train so many steps with W&B in this mode; return the milliseconds of a step."""
    config = replace(case.config, name="overhead", stages=["train"])
    config.logger = LoggerConfig(mode=mode)
    out.mkdir(parents=True)
    clocks = Clocks(steps)
    with Tracker(RunRecord(out, config, [])):
        heads = build_heads(case.inputs.backbone, num_heads=config.head.num_heads)
        module = build_module(config, case.inputs, heads, steps)
        trainer = build_trainer(
            torch.device(config.device),
            out,
            "train",
            max_steps=steps,
            precision="bf16-mixed",
            callbacks=[clocks],
        )
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, RichProgressBar)]
        trainer.fit(module, case.inputs.batches(config))
    return clocks.milliseconds()


def measure(work: Path, rounds: int, steps: int) -> list[Row]:
    """Return what a step with W&B takes over one without, by each clock."""
    case = build_case(work, layers=2, width=256, vocabulary=1024, documents=12 * steps)
    case.config.train.features = "cache"
    case.inputs.features = features_of(case, "kept")
    taken: dict[str, list[dict[str, float]]] = {"offline": [], "disabled": []}
    for number in range(rounds):
        for mode in sorted(taken, reverse=number % 2 == 1):
            taken[mode].append(train(case, mode, steps, work / f"{mode}-{number}"))
    sides = {name: [[row[name] for row in rows] for rows in taken.values()] for name in _CLOCKS}
    used, shortest = sides["wandb"][0], min(sides["processor"][1])
    return [
        _row("processor", *sides["processor"]),
        _row("wall", *sides["wall"]),
        _row("what W&B used", [shortest + one for one in used], [shortest]),
    ]


def _row(clock: str, offline: list[float], disabled: list[float]) -> Row:
    ratio = min(offline) / min(disabled)
    return Row(
        f"a training step with W&B offline / without ({clock})",
        "ms",
        min(offline),
        "<= 1.02",
        ratio <= 1.02,
        min(disabled),
        ratio,
        {
            "overhead, %": 100 * (ratio - 1),
            "of medians, %": 100 * (statistics.median(offline) / statistics.median(disabled) - 1),
            "offline, ms": [round(one, 3) for one in offline],
            "disabled, ms": [round(one, 3) for one in disabled],
        },
    )


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about = machine()
    time_log()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(work), arguments.rounds, arguments.steps)
    show(rows, about)
    if arguments.out:
        write(arguments.out, rows, about)


if __name__ == "__main__":
    main()
