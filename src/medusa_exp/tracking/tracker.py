"""W&B and CSV beside the run directory's own files, which never depend on them."""

import csv
import logging
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medusa_exp.errors import UserError
from medusa_exp.runs.extras import lacking
from medusa_exp.runs.files import publish, read_json, read_jsonl
from medusa_exp.runs.machine_faults import is_ours
from medusa_exp.runs.record import RunRecord

log = logging.getLogger(__name__)


class Tracker:
    """A context around a run's stages that opens and closes what `logger` names.

    What trains logs its steps by `log_step`. All else is mirrored from the run directory's files
    when a stage is done.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record, self.config, self.out = record, record.config, record.out
        self.run: Any = None
        self._exit = ExitStack()
        self._known_metrics = set(record.metrics)
        self._num_rows = 0
        self._lacks_steps = False

    def __enter__(self) -> "Tracker":
        with ExitStack() as opening:
            if self.config.logger.kind == "csv":
                opening.callback(_write_csv, self.out)
            if self.config.logger.kind == "wandb" and self.config.logger.mode != "disabled":
                self._open_wandb(opening)
            self._exit = opening.pop_all()
        return self

    def _open_wandb(self, opening: ExitStack) -> None:
        if missing := lacking("wandb", "logger=wandb"):
            if self.config.logger.mode == "online":
                raise UserError(f"{missing}, or set logger=none.")
            log.warning("%s. Without it, every number is in the files of %s", missing, self.out)
            return
        try:
            from medusa_exp.tracking.wandb_artifacts import log_code
            from medusa_exp.tracking.wandb_run import wandb_run

            self.run = opening.enter_context(wandb_run(self.record))
        except UserError:
            raise
        except Exception as error:  # the files are the record: no mirror's fault may end a run
            said = "W&B did not start (%s); all it would have is in %s"
            log.warning(said, error, self.out, exc_info=is_ours(error))
            return
        self._num_rows = len(self._history())
        if self.config.logger.artifacts:
            try:
                log_code(self.run, self.out)
            except Exception as error:
                log.warning("W&B lacks this run's code: %s", error, exc_info=is_ours(error))

    def log_step(self, stage: str, step: int | None, metrics: dict[str, float]) -> None:
        """Mirror a step of a training, which no fault of W&B's may end."""
        if self.run is None:
            return
        try:
            self.run.log({f"{stage}/step": step, **metrics})
        except Exception as error:
            if not self._lacks_steps:  # once: what is wrong now is so at the next step
                log.warning("W&B lacks steps of %s: %s", self.out, error)
            self._lacks_steps = True

    def stage_done(self, stage: str) -> None:
        """Mirror what a stage left: metrics.json, tables, pictures, artifacts."""
        if self.run is None:
            return
        from medusa_exp.tracking.wandb_run import mirror

        try:
            if stage == "train" and self.config.train.strategy != "auto":
                # Other processes have written the history, but have no W&B run.
                for row in self._history()[self._num_rows :]:
                    self.log_step(row.pop("stage"), row.pop("step"), row)
            mirror(self.run, self.record, stage, self._known_metrics - set(self.record.metrics))
        except Exception as error:
            log.warning(
                "W&B lacks what stage %s left in %s: %s",
                stage,
                self.out,
                error,
                exc_info=is_ours(error),
            )
        self._known_metrics = set(self.record.metrics)
        self._num_rows = len(self._history())

    def _history(self) -> list[dict[str, Any]]:
        return read_jsonl(self.out / "history.jsonl")

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)


def _write_csv(out: Path) -> None:
    """Write metrics.csv (name, value) and history.csv (a row a step) from the files of record."""
    metrics = read_json(out / "metrics.json", {})
    _write_rows(out / "metrics.csv", ["name", "value"], metrics.items())
    rows: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for row in read_jsonl(out / "history.jsonl"):  # of a step that was made again, the last counts
        rows[row["stage"], row["step"]].update(row)
    names = ["stage", "step"]
    names += sorted({name for row in rows.values() for name in row} - {*names})
    cells = ([row.get(name, "") for name in names] for row in rows.values())
    _write_rows(out / "history.csv", names, cells)


def _write_rows(path: Path, names: list[str], rows: Iterable[Iterable[Any]]) -> None:
    with publish(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
