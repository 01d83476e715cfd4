"""The command line: compose the config, run its stages in order, record what happened.

    python -m medusa_exp +experiment=NAME [key=value ...]      a new run
    python -m medusa_exp stages=[NAME] run_dir=DIR [...]       stages of an existing run
    python -m medusa_exp -m +experiment=NAME key=1,2 [...]     a sweep: many runs
    python -m medusa_exp +experiment=rerun rerun.source=DIR    a run done again, and compared

The second and the last form start from the run's saved config; see `config/continuation.py`.

What happens, in order: `main` puts the saved overrides of an existing run before the new ones;
Hydra composes the config and, in a sweep, hands out the jobs; for each job `_hydra_main` asks
`sweep` whether it is done already, `_checked_config` makes its config, and `run_stages` runs its
stages, records what each left and mirrors it to W&B.
"""

import atexit
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra._internal import utils as hydra_utils  # private: hydra 1.3
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from medusa_exp.config import (
    Config,
    checked_again,
    continuation,
    from_hydra,
    no_reference,
    register,
    said_of,
    to_dict,
)
from medusa_exp.config.command_line import key_of
from medusa_exp.config.ignored import say_ignored
from medusa_exp.config.privacy import shell_command, without_secrets
from medusa_exp.errors import Stopped, UserError, drop_output, end_without_reader
from medusa_exp.runs import machine_faults, sweep
from medusa_exp.runs.extras import lacking
from medusa_exp.runs.files import publish, read_json
from medusa_exp.runs.machine import ensure_home
from medusa_exp.runs.record import drop_refused, noted_failure
from medusa_exp.runs.seals import check_config, seal_config, verify
from medusa_exp.tracking.wandb_variables import with_variables

log = logging.getLogger(__name__)

STAGES = {
    "pretrain": "medusa_exp.stages.pretrain",
    "inspect": "medusa_exp.stages.inspection",
    "regenerate": "medusa_exp.stages.regenerate",
    "train": "medusa_exp.stages.train",
    "calibrate": "medusa_exp.stages.calibrate",
    "evaluate": "medusa_exp.stages.evaluate",
    "export": "medusa_exp.stages.export",
    "chat": "medusa_exp.stages.chat",
    "demo": "medusa_exp.stages.demo",
    "report": "medusa_exp.stages.report",
}
"""Stage -> module whose `run(config, out, session) -> metrics` does it. Imported when a run begins:
the command line itself must answer without torch."""

_LATER = ("calibrate", "evaluate", "export", "chat", "demo", "report")
"""Stages that begin no run: they read the heads that another has left."""

PROMISED = {
    "inspect": ("data.json",),
    "regenerate": ("regenerated.json",),
    "train": ("heads/config.json", "heads/model.safetensors"),
    "calibrate": ("calibration.json", "tree.json"),
    "evaluate": ("records.jsonl", "tree.json"),
}
"""Stage -> files of the run directory without which it has not done its work."""


# The one thing done at import: a launcher's processes load this module and nothing else of ours
# before they compose the config, in which these names stand.
register()
sweep.register()


class _Problem(CompactHydraException):
    """A UserError on its way through Hydra, which prints such an error without a traceback."""


def main() -> None:
    """Run the command line; exits with 1 after a problem, with 128 + N after signal N."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # no run ends for a bar that a terminal cannot show
            stream.reconfigure(errors="replace")
    if said := ensure_home():
        print(said, file=sys.stderr)
    _report_in_our_words()
    try:
        with machine_faults.told():
            given = sys.argv[1:]
            sys.argv[1:] = continuation.arguments(given)  # which refuses words that are too long
            continuation.check_begun(given, _LATER)
    except UserError as error:
        sys.exit(str(error))
    _listen_to_signals(is_sweep=continuation.is_sweep(given))
    try:
        _run_and_print_sweeps()
    except KeyboardInterrupt:  # while the jobs of a sweep are printed
        sys.exit(128 + signal.SIGINT)
    finally:
        # Registered last, done first: late signals stop nothing any more, and show no traceback.
        for number in (signal.SIGINT, signal.SIGTERM):
            atexit.register(signal.signal, number, signal.SIG_IGN)


def _run_and_print_sweeps() -> None:
    try:
        _hydra_main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError as error:
        end_without_reader(error)  # of `--help | head`: Hydra prints it beside what it reports
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's end after Ctrl-C is a 1
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        _print_sweeps()
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python would tell of it as it ends
            drop_output(sys.stdout)


def _report_in_our_words() -> None:
    """Have a full disk and its like told in one message, wherever Hydra or logging meets them.

    And mistyped keys, with the key that may have been meant; single values for lists, and values
    of other types; references that lead nowhere.
    """
    report, handle = hydra_utils.run_and_report, logging.Handler.handleError

    def run_and_report(func: Callable[[], Any]) -> Any:
        def run() -> Any:
            try:
                with machine_faults.told():
                    return func()
            except UserError as error:
                raise _Problem(str(error)) from error
            except HydraException as error:
                said = said_of(error)
                if said is None:
                    raise
                raise _Problem(said) from error
            except InterpolationResolutionError as error:
                raise _Problem(no_reference(error)) from error
            except BrokenPipeError as error:
                end_without_reader(error)  # such as `--cfg job | head`

        def tell() -> Any:
            try:
                return run()
            except _Problem as problem:
                _end_with(problem)
                raise

        return report(tell)

    def handle_error(self: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1] or Exception()
        if isinstance(error, BrokenPipeError) and isinstance(self, logging.StreamHandler):
            drop_output(self.stream)  # of `| head`: the run goes on, and so does its log
        # A full disk is reported once, by the stage that cannot go on: not by each line of log.
        elif machine_faults.message(error) is None:
            handle(self, record)

    hydra_utils.run_and_report = run_and_report
    logging.Handler.handleError = handle_error  # type: ignore[method-assign]


def _end_with(problem: Exception) -> None:
    """End the process with a message alone, unless the traceback is asked for.

    Hydra would put a line before it, with the overrides, and behind it the advice to ask.
    """
    # private: hydra 1.3
    if not (hydra_utils._is_env_set("HYDRA_FULL_ERROR") or hydra_utils.is_under_debugger()):
        sys.exit(str(problem))


def _listen_to_signals(*, is_sweep: bool) -> None:
    """Have a signal end the process: a run's at once, until `_begin` says that there is one.

    A sweep's own process has workers to end from its first moment on.
    """
    leave = _leave if is_sweep else _exit_at_once
    signal.signal(signal.SIGTERM, leave)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, leave)  # of SLURM, before a job's time is over
    if not is_sweep and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    """End the process, in which nothing is open yet.

    An exception between any two instructions is not safe where libraries load and Hydra composes:
    torch's C++ code aborts, and OmegaConf tells of a key that does not exist.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # it may be in the middle of a write
            stream.flush()
    os._exit(128 + number)


def _begin() -> None:
    """From here on signals are exceptions: there may be something to close."""
    for number in signal.valid_signals():
        if signal.getsignal(number) is _exit_at_once:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process as an exception does: what is open is closed on the way."""
    sys.exit(128 + number)


def _print_sweeps() -> None:
    """Print the jobs of the sweep that this process started, if it did, and where its page is."""
    for sweep_dir, jobs in sweep.started().items():
        if jobs:
            from medusa_exp.tracking.terminal import print_jobs

            print_jobs(sweep_dir, jobs)


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose and check a config as the command line does: `compose(["+experiment=smoke"])`.

    References to environment variables are resolved in what it returns. `run` saves a section as it
    was composed, with its references, unless it was changed meanwhile.

    Raises:
        UserError: naming the key and what it may be.
    """
    if isinstance(overrides, str):  # whose letters would be taken one by one
        raise UserError(f"compose takes a list of overrides: compose([{overrides!r}]).")
    try:
        with hydra.initialize_config_module("medusa_exp.conf", version_base="1.3"):
            composed = hydra.compose("config", list(overrides))
            config = from_hydra(composed)
    except HydraException as error:
        raise UserError(said_of(error) or str(error)) from error
    config.logger = with_variables(config.logger, overrides)
    vars(config)["_composed"] = composed
    say_ignored(config, overrides)
    return config


def run(config: Config, out: str | Path) -> dict[str, float]:
    """Run an experiment from Python: the stages of a composed config, in a run directory.

    Returns:
        What its metrics.json holds.

    Raises:
        UserError: a key of the config has a value that it cannot have, a stage is unknown, or the
            config does not fit data, model or machine.
    """
    out, composed = Path(out), vars(config).get("_composed")
    config.run_dir = str(out)
    config = checked_again(config)  # what was set since then has been checked by nobody
    vars(config)["_composed"] = composed
    _check_stages(config, is_sweep=False)
    saved = out / continuation.SAVED
    with machine_faults.told(out, config.cache_dir):
        if not saved.exists():
            with publish(saved) as partial:
                OmegaConf.save(OmegaConf.create(_as_composed(config)), partial)
            seal_config(saved.parent)
        run_stages(config, out, ["medusa_exp.run", str(out)])
    metrics: dict[str, float] = read_json(out / "metrics.json")
    return metrics


def _as_composed(config: Config) -> dict[str, Any]:
    """Return the config as plain values, and what is still as `compose` gave it with references."""
    plain = to_dict(config)
    if (composed := vars(config).get("_composed")) is not None:
        written: Any = OmegaConf.to_container(composed, resolve=False)
        before = to_dict(from_hydra(composed))
        plain = _unless_changed(plain, before, written)
    return plain


def _unless_changed(now: Any, before: Any, written: Any) -> Any:
    """Return what is `written` of each value that is `now` as it was `before`, else that of now.

    Within sections too: what one key stands for must not be saved because its neighbor changed.
    """
    if now == before:
        return written
    if not all(isinstance(value, dict) for value in (now, before, written)):
        return now
    return {
        key: _unless_changed(now[key], before[key], written[key])
        if key in before and key in written
        else now[key]
        for key in now
    }


@contextmanager
def _told_how_to_go_on(
    stages: Sequence[str], out: Path, overrides: Sequence[str]
) -> Iterator[None]:
    """Say, where a signal ends a run, in which stage it was and what command goes on there.

    With the run directory, which may have been named by the clock. A training says the same
    itself (`Stopped`), with the step. `overrides` are this call's that are not saved with the run.
    """
    earlier = _entries(out)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        number = signal.SIGINT if isinstance(end, KeyboardInterrupt) else _signal_of(end.code)
        if number is not None:
            entries = _entries(out)
            begun = [name for name in stages if entries.get(name) != earlier.get(name)]
            is_done = [entries[name].get("status") == "done" for name in begun]
            left = list(stages[is_done.count(True) :])
            said = "before its first stage: give the same command again."
            if not left:
                said = "after its last stage."
            elif begun:
                words = [f"stages=[{','.join(left)}]", f"run_dir={out}"]
                words += [
                    without_secrets(o) for o in overrides if key_of(o) not in ("stages", "run_dir")
                ]
                command = shell_command(["python", "-m", "medusa_exp", *words])
                said = f"in stage {left[0]}. This goes on there:\n{command}"
            print(f"stopped by {signal.Signals(number).name} {said}", file=sys.stderr)
        raise


def _entries(out: Path) -> dict[str, Any]:
    with suppress(UserError):  # damaged, which the run itself says
        entries: dict[str, Any] = read_json(out / "run.json", {}).get("stages", {})
        return entries
    return {}


def _signal_of(code: object) -> int | None:
    """Return the number of the signal that an exit code tells of, if it does."""
    number = code - 128 if isinstance(code, int) else 0
    return number if number in signal.valid_signals() else None


@hydra.main(version_base="1.3", config_path="pkg://medusa_exp.conf", config_name="config")
def _hydra_main(composed: DictConfig) -> float | None:
    job = HydraConfig.get()
    out = Path(job.runtime.output_dir)

    def run() -> float | None:
        new = continuation.new_overrides(out, job)
        command = ["python", "-m", "medusa_exp", *new]
        unsaved = new if continuation.continues(out, job) else []
        written: Any = OmegaConf.to_container(composed, resolve=False)
        saved = out / (job.output_subdir or continuation.SAVED.parent)
        with machine_faults.told(out, written["cache_dir"]):
            seal_config(saved)  # as Hydra has written it, perhaps in place of an older one
            try:
                config = _checked_config(composed, out)
            except UserError:
                # A job of a sweep is recorded, and tried again. What was there is somebody's.
                if job.mode == RunMode.RUN and not continuation.was_there():
                    drop_refused(out)
                raise
            seal_config(saved)  # of a run that is done again, it is that run's by now
            if job.mode != RunMode.RUN:  # a sweep's command goes on by itself
                return run_stages(config, out, command)
            with _told_how_to_go_on(config.stages, out, unsaved):
                return run_stages(config, out, command)

    try:
        if job.mode == RunMode.MULTIRUN:
            return sweep.run_once(out, job, run, composed.objective, _write_page)
        value = run()
        sweep.refresh(out, _write_page)
        return value
    except Stopped as stopped:  # as an error it would end a job, and a sweep would go on
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    except UserError as error:
        if job.mode != RunMode.MULTIRUN:  # whose jobs Hydra tells apart, and goes on after
            _end_with(error)
        raise _Problem(str(error)) from error


def _write_page(sweep_dir: Path) -> None:
    if missing := lacking("report", "the page of a sweep"):
        log.warning("%s", missing)
        return
    from medusa_exp.tracking.sweep_report import write_comparison

    write_comparison(sweep_dir)


def _checked_config(composed: DictConfig, out: Path) -> Config:
    job = HydraConfig.get()
    is_sweep = job.mode == RunMode.MULTIRUN
    config = from_hydra(continuation.effective_config(composed, out, job))
    config.run_dir = str(out)
    config.logger = with_variables(config.logger, job.overrides.task)
    if is_sweep and config.logger.group is None:
        config.logger.group = f"{config.name}/{Path(job.sweep.dir).name}"
    _check_stages(config, is_sweep)
    if kept := continuation.kept_in_words():
        log.info("from %s: %s", out / continuation.SAVED.parent, kept)
    say_ignored(config, continuation.new_overrides(out, job))
    return config


def _check_stages(config: Config, is_sweep: bool) -> None:
    """Raise a UserError where stages are none, unknown, or not for the jobs of a sweep."""
    if not config.stages:
        raise UserError(f"stages is empty: name some of {', '.join(STAGES)}.")
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages={stage} is not known: use some of {', '.join(STAGES)}.")
    if is_sweep and "train" in config.stages and config.train.strategy != "auto":
        raise UserError(
            f"train.strategy={config.train.strategy} in a sweep (-m): its jobs run one after the "
            "other in one process, and each would take all devices. Leave out -m, or set "
            "train.strategy=auto."
        )


def _check_promised(stage: str, out: Path) -> None:
    """Raise a UserError where a stage has ended without what the next ones, and users, read."""
    if missing := [name for name in PROMISED.get(stage, ()) if not (out / name).is_file()]:
        raise UserError(
            f"stage {stage} has ended without {' and '.join(missing)} in {out}: what was written "
            "there is on another machine or disk, or was removed. See medusa_exp.log."
        )


def run_stages(config: Config, out: Path, command: list[str]) -> float | None:
    """Run the stages of one job; return the value of `config.objective`, None where none has it.

    Writes `run.json` and `metrics.json` after every stage, so that a failure keeps what was done.
    `command` is, for the record, how it was called, without what was saved with the run.
    """
    from medusa_exp.runs.compare import compare_with_source
    from medusa_exp.runs.machine import log_machine
    from medusa_exp.runs.record import RunRecord
    from medusa_exp.stages.heads_card import write_card
    from medusa_exp.stages.session import Session
    from medusa_exp.tracking.terminal import print_summary, quiet_libraries
    from medusa_exp.tracking.tracker import Tracker

    modules = {name: importlib.import_module(STAGES[name]) for name in config.stages}
    _begin()
    if not log.isEnabledFor(logging.DEBUG):  # hydra.verbose=true
        quiet_libraries(config.stages)
    with noted_failure(out):
        log_machine(config.device)
        with continuation.told_of_places(out, config):
            Session(config, out).check_places()
            if config.heads_from is not None:
                Session(config, out).adopt_heads(config.heads_from)
        if config.rerun.source is not None:
            check_config(Path(config.rerun.source).expanduser())
        check_config(out)
        if config.cache.verify:
            verify(Path(config.cache_dir), out)
        record = RunRecord(out, config, command)
    with Tracker(record) as tracker:
        session = Session(config, out, tracker.log_step)
        for name in config.stages:
            log.info("stage %s", name)
            with record.stage(name) as session.notes:
                metrics = modules[name].run(config, out, session)
                _check_promised(name, out)
            record.merge_metrics(name, metrics)
            write_card(config, out)
            tracker.stage_done(name)
    print_summary(record)
    compare_with_source(config.rerun.source, out)
    return record.metrics.get(config.objective)
