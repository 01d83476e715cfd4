"""The jobs of a sweep (`-m`, `+sweep=NAME`): each known by its overrides, each done once.

A job's directory is named by a hash of its overrides, not by its number. The same command with the
same `sweep_dir` therefore finds its jobs again: it passes over those that are done and goes on with
the others, whatever became of the process that ran them (`runs/jobs.py`: how each stands). Hydra's
launchers decide where and when it runs.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from medusa_exp.config import continuation
from medusa_exp.config.command_line import swept_keys
from medusa_exp.errors import UserError
from medusa_exp.runs.files import content_key, read_json, write_json
from medusa_exp.runs.jobs import JOB, held, is_done, is_held, read_jobs
from medusa_exp.runs.machine_faults import is_ours
from medusa_exp.runs.metric_table import METRICS, as_objective
from medusa_exp.runs.record import check_record, how_it_ended

log = logging.getLogger(__name__)
_DECIDE = {"stages", "objective", "experiment", "rerun", "rerun.source"}
"""Keys that say what jobs measure and are compared by: not known where a sweep tries several."""


def register() -> None:
    """Make known what `conf/config.yaml` asks of Hydra for sweeps."""
    OmegaConf.register_new_resolver("medusa_exp.job_id", content_key, replace=True)
    OmegaConf.register_new_resolver("medusa_exp.hydra_subdir", _hydra_subdir, replace=True)
    name = "medusa_exp.saved_objective"
    OmegaConf.register_new_resolver(name, continuation.saved_objective, replace=True)
    target = f"{__name__}.{_StartedSweeps.__name__}"
    node = {"started_sweeps": {"_target_": target}}
    ConfigStore.instance().store(group="hydra/callbacks", name="started_sweeps", node=node)


def _hydra_subdir(out: str) -> str | None:
    """Return where Hydra writes down a job's config: nowhere if it is done, or being done."""
    try:
        return None if is_done(Path(out)) or is_held(Path(out)) else ".hydra"
    except UserError:  # of a damaged record, which `run_once` tells; here it would be a traceback
        return None


class _StartedSweeps(Callback):
    """Remembers the directory of the sweep that this process starts; refuses what cannot begin.

    It is Hydra that resolves it, and only its callbacks are told in the process that launches.
    """

    directories: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at what needs no run directory, before Hydra makes it."""
        try:
            continuation.check_new(config)
        except UserError as error:
            sys.exit(str(error))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            _check_search(config.hydra.sweeper, config.objective, config.stages)
            _check_objective(config)
        except UserError as error:  # of errors in a callback Hydra makes warnings
            sys.exit(str(error))
        self.directories.append(Path(str(config.hydra.sweep.dir)))


def _check_search(sweeper: Any, objective: str, stages: Sequence[str]) -> None:
    """Refuse a search that would find nothing, or the worst, before its first job.

    Raises:
        UserError: no stage measures the objective; or Optuna, which minimizes unless it is told
            otherwise, would go the wrong way.
    """
    metric = as_objective(objective)
    if "direction" not in sweeper:  # it looks for nothing
        return
    if metric.stage not in stages:
        raise UserError(
            f"objective={objective} is a metric of stage {metric.stage}, which stages="
            f"[{','.join(stages)}] leaves out: the search would have nothing to go by."
        )
    given = str(sweeper.direction).rpartition(".")[2]
    wanted, hint = "minimize", ""
    if metric.better == "larger":
        wanted, hint = "maximize", ", or take hydra/sweeper=optuna_maximize"
    if metric.better and given in ("minimize", "maximize") and given != wanted:
        raise UserError(
            f"hydra.sweeper.direction={given} with objective={objective} looks for the worst: "
            f"set hydra.sweeper.direction={wanted}{hint}."
        )


def _check_objective(config: DictConfig) -> None:
    """Refuse a sweep whose jobs would all end without the metric that they are compared by.

    Not where a job is done: the metric may have been measured by a later call of its run.

    Raises:
        UserError: other stages measure it; names a metric that these do.
    """
    task = config.hydra.overrides.task
    swept = {*(config.hydra.sweeper.get("params") or {}), *swept_keys(task)}
    stages, objective = [str(stage) for stage in config.stages], config.objective
    if swept & _DECIDE or config.rerun.source is not None:
        return
    stage = as_objective(objective).stage
    others = [row.name for row in METRICS if row.stage in stages and row.better]
    if stage in stages or not others:
        return
    jobs = read_jobs(Path(str(config.hydra.sweep.dir))).values()
    if any(job["status"] == "done" for job in jobs):
        return
    raise UserError(
        f"objective={objective} is a metric of stage {stage}, which stages=[{','.join(stages)}] "
        f"leaves out: nothing would compare these jobs. Set objective={others[0]} or another "
        "that they measure (docs/reference/metrics.md has all), or add that stage."
    )


def started() -> dict[Path, dict[str, dict[str, Any]]]:
    """Return the jobs, by directory, of the sweeps that this process started."""
    return {sweep_dir: read_jobs(sweep_dir) for sweep_dir in _StartedSweeps.directories}


def run_once(
    out: Path,
    hydra_config: HydraConf,
    run: Callable[[], float | None],
    objective: str,
    write_page: Callable[[Path], object],
) -> float | None:
    """Run a job and write down how it ended, or return what it returned when it was done.

    A job that was done is not done again where the metric asked for is another one: that is looked
    up in its `metrics.json`. `write_page` brings the page of the sweep in a directory up to date.
    """
    with held(out):
        if is_done(out):
            log.info("done already: %s", out)
            check_record(out)
            if _update_value(out, objective):
                _update_page(out.parent, write_page)
            return _warned(read_json(out / JOB)["value"], objective)
        job = {
            "number": hydra_config.job.num,
            "overrides": OmegaConf.to_container(hydra_config.overrides.task),
            "objective": objective,
            "attempts": read_json(out / JOB, {}).get("attempts", 0) + 1,
            "status": "running",
            "value": None,
        }
        write_json(out / JOB, job)
        try:
            job["value"] = run()
            job["status"] = "done"
        except BaseException as error:
            job |= how_it_ended(error, out)
            raise
        finally:
            write_json(out / JOB, job)
            _update_page(out.parent, write_page)
    return _warned(job["value"], objective)


def _warned(value: float | None, objective: str) -> float | None:
    """Return the value of a job; say so where there is none."""
    if value is None:
        log.warning("objective=%s is no metric that these stages measure", objective)
    return value


def refresh(out: Path, write_page: Callable[[Path], object]) -> None:
    """Have a sweep know what a later call of one of its jobs' runs has found."""
    if is_done(out):
        with held(out):
            _update_value(out, read_json(out / JOB)["objective"])
        _update_page(out.parent, write_page)  # with its other figures


def _update_value(out: Path, objective: str) -> bool:
    """Write down the objective of a job that is done, and say whether that is news.

    It may be another metric than then, and a later call may have measured it anew.
    """
    job, value = read_json(out / JOB), read_json(out / "metrics.json", {}).get(objective)
    is_news = bool((job["objective"], job["value"]) != (objective, value))
    if is_news:
        write_json(out / JOB, {**job, "objective": objective, "value": value})
    return is_news


def _update_page(sweep_dir: Path, write_page: Callable[[Path], object]) -> None:
    """Bring the sweep's page up to date; no fault of it is one of the job's."""
    try:
        write_page(sweep_dir)
    except Exception as error:
        page = sweep_dir / "report.html"
        log.warning("%s is not up to date: %s", page, error, exc_info=is_ours(error))
