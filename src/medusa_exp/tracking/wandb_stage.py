"""A finished stage, as its files have it, into the open W&B run."""

import logging
from pathlib import Path
from typing import Any

from medusa_exp.config import Config
from medusa_exp.runs.files import read_jsonl
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking.wandb_artifacts import log_artifacts
from medusa_exp.tracking.wandb_media import media
from medusa_exp.tracking.wandb_metrics import best_values
from medusa_exp.tracking.wandb_run import provenance

log = logging.getLogger(__name__)

_DRAWN_BY_STEP = ("pretrain", "train")
"""Stages whose metrics are in W&B's history already, at their steps."""


def mirror(
    run: Any,
    config: Config,
    out: Path,
    stage: str,
    record: RunRecord,
    dropped: set[str],
    unseen: list[dict[str, Any]],
) -> None:
    """Log what a stage left.

    Args:
        run: the open W&B run.
        config: of this call.
        out: the run directory.
        stage: the stage that is done.
        record: with the metrics of all stages.
        dropped: metrics that an earlier call gave and that are no more.
        unseen: rows of history.jsonl that another process wrote.
    """
    for row in unseen:
        run.log(history_row(row))
    if stage not in _DRAWN_BY_STEP:
        names = record.run["stages"][stage]["metrics"]
        run.log({name: record.metrics[name] for name in names})
    try:
        for media_row in media(out, stage):
            run.log(media_row)
        if config.logger.artifacts:
            log_artifacts(run, config, out, stage)
    except Exception:  # the files are the record: no mirror's fault may end a run
        log.warning(
            "W&B: a table, picture or artifact of stage %s is missing", stage, exc_info=True
        )
    for name in dropped:
        del run.summary[name]
    # Last, for these take the place of what W&B made of the history.
    run.summary.update({**best_values(read_jsonl(out / "history.jsonl")), **record.metrics})
    run.config.update({"provenance": provenance(record.run)}, allow_val_change=True)


def history_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of history.jsonl as `run.log` takes it."""
    metrics = {name: value for name, value in row.items() if name not in ("stage", "step")}
    return {f"{row['stage']}/step": row["step"], **metrics}
