"""W&B and CSV beside the run directory's own files, which never depend on them."""

import csv
import json
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from medusa_exp.config import Config, to_dict
from medusa_exp.files import publish, read_json, read_jsonl

log = logging.getLogger(__name__)


class Tracker:
    """A context around a run's stages that opens and closes what `logger` names.

    While it is open with W&B, `wandb.run` is the run, by W&B's own convention; stages log there.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self.config = config
        self.out = out
        self.run: Any = None

    def __enter__(self) -> "Tracker":
        if self.config.logger.kind == "wandb":
            self.run = _open_wandb(self.config, self.out)
        return self

    def summary(self, metrics: dict[str, float]) -> None:
        """Add a stage's metrics to W&B's summary."""
        if self.run is not None:
            self.run.summary.update(metrics)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)
        if self.config.logger.kind == "csv":
            _write_csv(self.out)


def log_table(name: str, rows: list[dict[str, Any]]) -> None:
    """Log a table to W&B where a run is open; lists become JSON text."""
    wandb = sys.modules.get("wandb")  # loaded only where logger=wandb has opened a run
    if wandb is None or wandb.run is None or not rows:
        return
    cells = [
        [json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in row.values()]
        for row in rows
    ]
    wandb.log({name: wandb.Table(columns=list(rows[0]), data=cells)})


def _open_wandb(config: Config, out: Path) -> Any:
    import wandb

    logger = config.logger
    run = wandb.init(
        project=logger.project,
        entity=logger.entity,
        group=logger.group,
        name=f"{config.name}/{out.name}",
        tags=logger.tags or None,
        notes=logger.notes,
        mode=logger.mode,  # type: ignore[arg-type]
        dir=out,
        config=to_dict(config),
        settings=wandb.Settings(console="off", silent=True),
    )
    for stage in ("pretrain", "train"):
        run.define_metric(f"{stage}/step", hidden=True)
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    run.define_metric("val/*", step_metric="train/step")
    return run


def _write_csv(out: Path) -> None:
    """Write metrics.csv (name, value) and history.csv (a row a step) from the files of record."""
    metrics = read_json(out / "metrics.json", {})
    with publish(out / "metrics.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "value"), *metrics.items()])
    rows = read_jsonl(out / "history.jsonl")
    names = sorted({name for row in rows for name in row} - {"stage", "step"})
    with publish(out / "history.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["stage", "step", *names])
        writer.writeheader()
        writer.writerows(rows)
