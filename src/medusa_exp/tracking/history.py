"""`history.jsonl`: every logged step of training, whatever the logger.

A line is {"stage": ..., "step": ..., metric: number, ...}. It is only ever added to; where a run
was resumed, a step may stand twice, and the later line counts.
"""

import json
import logging
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from medusa_exp.runs.files import drop_torn_line

log = logging.getLogger(__name__)


class HistoryLogger(Logger):
    """Lightning's logger interface onto history.jsonl, mirrored to W&B where a run is open."""

    def __init__(self, out: Path, stage: str) -> None:
        super().__init__()
        self.path = out / "history.jsonl"
        drop_torn_line(self.path)
        self.stage = stage
        self._is_mirrored = True

    @property
    def name(self) -> str:
        """The stage."""
        return self.stage

    @property
    def version(self) -> str:
        """Of no use here; Lightning wants one."""
        return ""

    @rank_zero_only  # of several processes, the first
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; numbers that JSON cannot say are left out."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        finite.pop("epoch", None)
        line = {"stage": self.stage, "step": step, **finite}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        wandb = sys.modules.get("wandb")  # loaded only where logger=wandb has opened a run
        if self._is_mirrored and wandb is not None and wandb.run is not None:
            try:
                wandb.run.log({f"{self.stage}/step": step, **finite})
            except Exception as error:  # no training may end for its mirror's sake
                self._is_mirrored = False
                log.warning("W&B takes no more steps (%s); %s has them all", error, self.path)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """Nothing to do: the composed config is kept by Hydra and by W&B."""
