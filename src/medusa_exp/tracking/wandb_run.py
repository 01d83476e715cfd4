"""Opening and closing the W&B run of a run directory: one run, whatever stages and calls it has."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from medusa_exp.config import Config, to_shareable
from medusa_exp.errors import UserError
from medusa_exp.tracking.redaction import shareable
from medusa_exp.tracking.wandb_metrics import define_metrics

log = logging.getLogger(__name__)

_INIT_SECONDS = 15.0
"""Longest wait for W&B's server at the start, in mode online."""
_FINISH_SECONDS = 120.0
"""And at the end, for what is not uploaded yet. Whatever is not lies in the run directory."""


@contextmanager
def wandb_run(config: Config, out: Path, record: dict[str, Any]) -> Iterator[Any]:
    """Yield the run of this directory, the one of earlier calls where there was one; finish it.

    Without an answer of W&B's server it is an offline run: a warning, and nothing is lost.

    Args:
        config: of this call.
        out: the run directory.
        record: run.json; its `wandb` keeps what makes a later call go on with the same run.

    Raises:
        UserError: mode online, and nobody is logged in.
    """
    known = record.setdefault("wandb", {})
    known.setdefault("id", uuid4().hex[:8])
    known.setdefault("job_type", config.logger.job_type or "+".join(config.stages))
    with _staging_in(out):
        run = _init(
            config.logger.mode,
            **_identity(config, out, known),
            config={**_shared_config(config, out), "provenance": provenance(record)},
            settings=_settings(record),
        )
        try:
            define_metrics(run)
            yield run
        except BaseException as error:
            _finish(run, error)
            raise
        _finish(run, None)


def _init(mode: str, **arguments: Any) -> Any:
    import wandb

    init: Any = wandb.init
    try:
        return init(mode=mode, **arguments)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise UserError(
            f"logger.mode={mode}: {error} Run `wandb login`, or set logger.mode=offline and use "
            "`wandb sync` later."
        ) from error
    except wandb.errors.CommError as error:
        log.warning("no answer from W&B (%s): logging offline", _first_line(error))
        wandb.teardown()  # its service holds the run's id until then
        return init(mode="offline", **arguments)


def _finish(run: Any, error: BaseException | None) -> None:
    """Finish the run in the state that it deserves; W&B's troubles end no run of ours."""
    is_clean = error is None or (isinstance(error, SystemExit) and not error.code)
    folder = Path(run.dir).parent
    try:
        run.finish(exit_code=0 if is_clean else 255 if isinstance(error, KeyboardInterrupt) else 1)
    except Exception as trouble:
        log.warning("W&B: %s; `wandb sync %s` uploads it later", _first_line(trouble), folder)
        return
    if run.offline:
        log.info(
            "W&B: offline; `wandb leet %s` shows it, `wandb sync %s` uploads it", *[folder] * 2
        )


def provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says of code and machine, for W&B's config."""
    names = ("command", "git", "versions", "device", "cache_keys", "data")
    return shareable({name: record[name] for name in names if name in record})


@contextmanager
def _staging_in(out: Path) -> Iterator[None]:
    """Let W&B keep what waits for its upload in the run directory, not in the user's home."""
    name = "WANDB_DATA_DIR"  # W&B has no setting for it
    before = os.environ.get(name)
    os.environ[name] = str(out / "wandb")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _identity(config: Config, out: Path, known: dict[str, str]) -> dict[str, Any]:
    logger = config.logger
    return {
        "id": known["id"],
        "resume": "allow",
        "project": logger.project,
        "entity": logger.entity,
        "group": logger.group,
        "job_type": known["job_type"],
        "name": f"{config.name}/{out.name}",
        "tags": logger.tags or None,
        "notes": logger.notes,
        "dir": out,
    }


def _shared_config(config: Config, out: Path) -> dict[str, Any]:
    calls = [path for path in out.glob(".hydra*/config.yaml") if path.parent.name != ".hydra"]
    newest = max(calls, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    saved = newest or out / ".hydra" / "config.yaml"
    return shareable(to_shareable(config, saved))


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return W&B's settings: no file name, host, user or variable of this machine is collected.

    Its own metadata has all of them (SLURM's variables too); `provenance` is sent in its place.
    """
    git = record.get("git", {})
    return {
        "console": "off",
        "silent": True,
        "init_timeout": _INIT_SECONDS,
        "finish_timeout": _FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_disable_meta": True,
        "host": "",
        "disable_git": True,  # its git state is the current directory's, not this package's
        "git_commit": git.get("commit"),
        "git_remote_url": shareable(git.get("remote")),
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
