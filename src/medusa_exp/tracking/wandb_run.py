"""The W&B run of a run directory: opened, told of each finished stage, finished.

It is one run, whatever stages and calls the run directory has. It is written offline, in mode
online too, and uploaded meanwhile: see `upload.py`.
"""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import wandb

from medusa_exp.config import Config, to_shareable
from medusa_exp.config.continuation import newest_saved
from medusa_exp.config.privacy import by_name, shareable
from medusa_exp.errors import Stopped
from medusa_exp.runs.files import read_jsonl
from medusa_exp.runs.machine_faults import is_ours
from medusa_exp.runs.metric_table import AXES, METRICS, metric_of
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking.upload import Upload, require_login
from medusa_exp.tracking.wandb_artifacts import log_artifacts
from medusa_exp.tracking.wandb_media import media

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0
"""What kill -9 may cost; W&B's own 15 s would also be the delay of what `wandb leet` shows."""
_DRAWN_BY_STEP = ("pretrain", "train")
"""Stages whose metrics are in W&B's history already, at their steps."""


@contextmanager
def wandb_run(record: RunRecord) -> Iterator[Any]:
    """Yield the run of this directory, the one of earlier calls where there was one; finish it.

    In run.json, `wandb` keeps what makes a later call go on with the same run.

    Raises:
        UserError: mode online, and nobody is logged in.
    """
    config, out = record.config, record.out
    is_online = config.logger.mode == "online"
    if is_online:
        require_login()
    known = record.run.setdefault("wandb", {})
    known.setdefault("id", uuid4().hex[:8])
    shown = shareable(to_shareable(config, newest_saved(out)))
    known.setdefault("job_type", shown["logger"]["job_type"] or "+".join(config.stages))
    if shown["logger"]["group"]:  # a sweep's; a later call of its job would not know it
        known["group"] = shown["logger"]["group"]
    with _environment(out):
        run: Any = wandb.init(
            mode="offline",
            **_identity(config, shown, out, known),
            config={**shown, "provenance": provenance(record.run)},
            settings=_settings(record.run),
        )
        known["id"] = run.id  # that of its own agent, in a sweep of W&B's
        upload = _upload(Path(run.dir).parent) if is_online else None
        try:
            define_metrics(run)
            yield run
        except BaseException as error:
            _finish(run, upload, error)
            raise
        _finish(run, upload, None)


def _identity(
    config: Config, shown: dict[str, Any], out: Path, known: dict[str, str]
) -> dict[str, Any]:
    """Return how the run is called; where it goes has to be said as it is, all else as `shown`."""
    return {
        "id": known["id"],
        "resume": "allow",
        "project": config.logger.project,
        "entity": config.logger.entity,
        "group": known.get("group"),
        "job_type": known["job_type"],
        "name": os.environ.get("WANDB_NAME") or f"{shown['name']}/{out.name}",
        "tags": shown["logger"]["tags"] or None,
        "notes": shown["logger"]["notes"],
        "dir": out,
    }


def provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says of code and machine, for W&B's config; data files by name alone."""
    names = ("command", "git", "versions", "device", "cache_keys")
    known = {name: record[name] for name in names if name in record}
    return shareable({**known, "data": by_name(record.get("data", {}))})


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return W&B's settings: no file name, host, user or variable of this machine is collected.

    Its own metadata has all of them (SLURM's variables too); `provenance` is sent in its place.
    """
    git = record.get("git", {})
    return {
        "console": "off",
        "silent": True,
        "x_disable_meta": True,
        "x_transaction_log_flush_interval": _FLUSH_SECONDS,
        "host": "",
        "disable_git": True,  # its git state is the current directory's, not this package's
        "git_commit": git.get("commit"),
        "git_remote_url": shareable(git.get("remote")),
    }


@contextmanager
def _environment(out: Path) -> Iterator[None]:
    """Set what W&B has no settings for.

    What waits for its upload is kept in the run directory, not in the user's home. And no telemetry
    of its own: it would wait for the server once more when the process ends.
    """
    ours = {"WANDB_DATA_DIR": str(out / "wandb")}
    if "WANDB_ERROR_REPORTING" not in os.environ:
        ours["WANDB_ERROR_REPORTING"] = "false"
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def define_metrics(run: Any) -> None:
    """Give an open W&B run its axes and best values.

    While a run trains, its summary has the best value so far, as `val/accept_length.max`. At the
    end of a stage the numbers of metrics.json take their names, and `best/...` keeps the best.
    """
    for word, axis in AXES.items():
        summary = "none" if word.startswith("by_") else None
        run.define_metric(axis, hidden=True, summary=summary)
        if word != "val":  # of which each has a best value
            run.define_metric(f"{word}/*", step_metric=axis, summary=summary)
    for metric in METRICS:
        if metric.has_best:
            pattern = re.sub(r"\{\w+\}", "*", metric.name)
            better = "max" if metric.better == "larger" else "min"
            run.define_metric(pattern, step_metric=AXES["val"], summary=better)


def mirror(run: Any, record: RunRecord, stage: str, dropped: set[str]) -> None:
    """Log what a stage left; `dropped` are metrics of an earlier call that are no more."""
    if stage not in _DRAWN_BY_STEP:
        names = record.run["stages"][stage]["metrics"]
        run.log({name: record.metrics[name] for name in names})
    try:
        for media_row in media(record.out, stage):
            run.log(media_row)
        if record.config.logger.artifacts:
            log_artifacts(run, record.config, record.out, stage)
    except Exception as error:  # the files are the record: no mirror's fault may end a run
        log.warning(
            "W&B: a table, picture or artifact of stage %s is missing: %s",
            stage,
            error,
            exc_info=is_ours(error),
        )
    for name in dropped:
        del run.summary[name]
    # Last, for these take the place of what W&B made of the history.
    run.summary.update({**best_values(read_jsonl(record.out / "history.jsonl")), **record.metrics})
    run.config.update({"provenance": provenance(record.run)}, allow_val_change=True)


def best_values(history: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return `best/<metric>` of every metric of a validation in the rows of history.jsonl."""
    best: dict[str, float] = {}
    for row in history:
        for name, value in row.items():
            metric = metric_of(name)
            if metric is not None and metric.has_best and math.isfinite(value):
                choose = max if metric.better == "larger" else min
                best[f"best/{name}"] = choose(value, best.get(f"best/{name}", value))
    return best


def _upload(folder: Path) -> Upload | None:
    try:
        return Upload(folder)
    except OSError as error:
        log.warning("W&B: no process can be started to upload the run (%s)", error)
        return None


def _finish(run: Any, upload: Upload | None, error: BaseException | None) -> None:
    """Finish the run in the state that it deserves; W&B's troubles end no run of ours."""
    folder = Path(run.dir).parent
    try:
        try:
            run.finish(exit_code=_exit_code(error))
        finally:
            if upload is not None:  # else it would go on beside the next job of a sweep
                upload.finish()
    except Exception as trouble:
        log.warning("W&B: %s; `wandb sync %s` uploads what there is", trouble, folder)
        return
    if upload is None:
        log.info(
            "W&B: offline; `wandb leet %s` shows it, `wandb sync %s` uploads it", *[folder] * 2
        )


def _exit_code(error: BaseException | None) -> int:
    """Return what W&B tells states by; it has 255 itself for a run that a person ended."""
    # Lightning's exception after SIGTERM is a SystemExit without a code.
    if error is None or (type(error) is SystemExit and not error.code):
        return 0
    return 255 if isinstance(error, KeyboardInterrupt | Stopped) else 1
