"""`history.jsonl`: every logged step of training, whatever the logger.

A line is {"stage": ..., "step": ..., metric: number, ...}. It is only ever added to; where a run
was resumed, a step may stand twice, and the later line counts.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from medusa_exp.runs.files import drop_torn_line

StepLogger = Callable[[str, int | None, dict[str, float]], None]
"""Takes a stage's name, its step and the metrics of that step; raises nothing."""


class HistoryLogger(Logger):
    """Lightning's logger interface onto history.jsonl, perhaps with a mirror."""

    def __init__(self, out: Path, stage: str, mirror: StepLogger | None = None) -> None:
        super().__init__()
        self._mirror = mirror
        self.path = out / "history.jsonl"
        drop_torn_line(self.path)
        self.stage = stage

    @property
    def name(self) -> str:
        return self.stage

    @property
    def version(self) -> str:
        return ""  # of no use here; Lightning wants one

    @rank_zero_only  # of several processes, the first
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; numbers that JSON cannot say are left out."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        finite.pop("epoch", None)
        line = {"stage": self.stage, "step": step, **finite}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(json.dumps(line) + "\n")
        if self._mirror is not None:
            self._mirror(self.stage, step, finite)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Nothing to do: the composed config is kept by Hydra and by W&B."""
