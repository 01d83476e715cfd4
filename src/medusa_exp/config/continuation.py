"""Continue an existing run: its saved config is the base, new overrides come on top.

Hydra composes every call from the YAML files alone. For a run directory that exists we let it
compose the saved overrides and the new ones together, which checks the new ones and expands their
groups, and then take from that composition only what the new overrides name. Everything else
comes from `.hydra/config.yaml`, so a default that changed since cannot slip into an old run.
Hydra's own record of the later call goes to `.hydra-<n>/`; `.hydra/` is never rewritten. (A sweep
that tries a failed job again is no later call: it composes the job anew, `.hydra/` included.)
"""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from medusa_exp.config import Config, load_saved, to_dict
from medusa_exp.config.command_line import (
    GROUPS_ALONE,
    check_words,
    key_of,
    overrides_in,
    parsed,
)
from medusa_exp.config.privacy import without_secrets
from medusa_exp.config.reading import check_regular
from medusa_exp.config.schema import check_model
from medusa_exp.config.trust import check_override, check_saved, load_yaml
from medusa_exp.errors import UserError

SAVED = Path(".hydra/config.yaml")
_BEGUN = "run.json"
"""Without it no stage ever began in a directory: its config was refused, and is none to keep."""
_OF_RERUN = ("experiment", "rerun.source", "run_dir", "sweep_dir")
"""Keys that say how a run is done again, not what is done."""
_BRING_HEADS = {"experiment", "heads_from", "rerun.source", "rerun"}
_SAID: set[str] = set()
"""Keys that this command line names, also those whose override was saved in just these words."""
_KEPT: list[str] = []
"""Saved overrides that this command line goes on with, and does not give."""
_THERE: set[Path] = set()
"""The run directory that this command line names, if there was one already."""
_MOST_SHOWN, _LONGEST_SHOWN = 6, 40
_OVERRIDES = Path(".hydra/overrides.yaml")
_OF_HYDRA = Path(".hydra/hydra.yaml")
_PLACES = (
    *("model.path", "tokenizer.path", "dataset.path", "heads_from", "train.heads_from"),
    *("tree.path", "evaluate.path"),
)
"""Keys that may be paths to what is read."""
_LATER_CALL = re.compile(r"\.hydra-[0-9]{1,9}")


def arguments(argv: list[str]) -> list[str]:
    """Return the arguments for Hydra: `argv`, after the saved overrides of the run it names.

    Raises:
        UserError: `argv` asks for what an existing run cannot do (a sweep, another experiment), or
            has options that nobody knows.
    """
    _KEPT.clear()
    check_words(argv)
    _refuse_hidden_run_dirs(argv)
    run_dir, new = _run_dir(argv), overrides_in(argv)
    _THERE.clear()
    if run_dir is not None and (run_dir.exists() or run_dir.is_symlink()):
        _THERE.add(run_dir)
    if run_dir is not None and is_sweep(argv):
        raise UserError(
            f"run_dir={run_dir} is one run, and a sweep makes many, in sweep_dir: "
            "leave out run_dir, or leave out -m and +sweep."
        )
    flags = [argument for argument in argv if argument not in new]
    if run_dir is None or not _has_begun(run_dir):
        return [*new, *flags]  # Hydra would not find those that flags divide
    _check_logs(run_dir)
    saved = _saved_overrides(run_dir)
    for override in new:
        if key_of(override) == "experiment" and override not in saved:
            raise UserError(
                f"{override} does not go with run_dir={run_dir}, a run that exists: "
                "an experiment belongs to a new run; override single keys or groups instead."
            )
    named = set(map(key_of, new))
    _SAID.update(named - set(GROUPS_ALONE))
    kept = [override for override in saved if key_of(override) not in named]
    _KEPT[:] = kept
    # A job of a sweep has saved the sweep's overrides too; it is one run from now on.
    ours = ["hydra.mode=RUN", f"hydra.output_subdir={_next_subdir(run_dir)}"]
    return [*flags, *kept, *new, *ours]


def was_there() -> bool:
    """Say whether the directory of the named run was there before this command."""
    return bool(_THERE)


def kept_in_words() -> str:
    """Return in a line what this command goes on with that was given when the run began.

    Empty where it gives all of that itself, or begins a run.
    """
    bare = map(without_secrets, _KEPT)
    shown = [f"{o[: _LONGEST_SHOWN - 3]}..." if len(o) > _LONGEST_SHOWN else o for o in bare]
    more = [f"and {len(shown) - _MOST_SHOWN} more"] if len(shown) > _MOST_SHOWN else []
    return ", ".join([*shown[:_MOST_SHOWN], *more])


def check_new(config: DictConfig) -> None:
    """Refuse a composed config as `check_model` does, if nothing else brings a config with it.

    Raises:
        UserError: model.path is not set, or rerun.source where a run is to be done again.
    """
    # Which are told where the config is checked, and where the directory is made.
    with suppress(OmegaConfBaseException, OSError):
        _check_source(config, config.hydra)
        if config.rerun.source is None and not _has_begun(Path(config.hydra.run.dir)):
            check_model(config)


def _check_source(config: DictConfig, hydra_config: Any) -> None:
    """Refuse to do a run again that is not named.

    Raises:
        UserError: rerun.source is not set.
    """
    if config.rerun.source is None and hydra_config.runtime.choices.get("experiment") == "rerun":
        raise UserError(
            "rerun.source is not set: name the run directory of the run that is to be done again."
        )


def check_begun(argv: list[str], later: Collection[str]) -> None:
    """Refuse a command whose stages all go on with a run, and that names none: a slip of the pen.

    Args:
        argv: the command line, as it was given.
        later: stages that go on with what others have left in the run directory.

    Raises:
        UserError: nothing is there that they could go on with.
    """
    new = overrides_in(argv)
    named = {key_of(override): override for override in new}
    stages: Any = parsed(named["stages"]).value() if "stages" in named else None
    can_begin = not isinstance(stages, list) or not stages or set(map(str, stages)) - set(later)
    # These may bring heads with them; and flags ask for something else than a run.
    if can_begin or _BRING_HEADS & set(named) or is_sweep(argv) or len(new) < len(argv):
        return
    words = f"stages=[{','.join(map(str, stages))}] goes on with a run"
    yours = "`python -m medusa_exp.runs.list` shows yours"
    run_dir = _run_dir(argv)
    if run_dir is None and "hydra.run.dir" not in named:
        raise UserError(f"{words}: name it by run_dir=DIR; {yours}.")
    if run_dir is not None and not (_has_begun(run_dir) or (run_dir / "heads").is_dir()):
        raise UserError(f"run_dir={run_dir}: there is no such run, and {words}; {yours}.")


def is_sweep(argv: list[str]) -> bool:
    """Say whether a command line asks for a sweep."""
    names_one = any(key_of(override) == "sweep" for override in overrides_in(argv))
    return names_one or bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(argv))


def effective_config(composed: DictConfig, out: Path, hydra_config: HydraConf) -> DictConfig:
    """Return the config of this job: `composed`, or a saved one with what is new on top.

    That is the one of the run that goes on in `out`, or of the one that `rerun.source` names.

    Raises:
        UserError: there is no such run, or today's schema does not know its config.
    """
    keys = [key_of(override) for override in new_overrides(out, hydra_config)]
    if continues(out, hydra_config):
        config = load_saved(out / SAVED)
        # A group that is said again as it was changes nothing; a key may be said to be allowed.
        written = OmegaConf.to_container(composed, resolve=False)
        again = [key for key in sorted(_SAID) if not isinstance(_at(written, key.split(".")), dict)]
        overlay(config, composed, [*keys, *again])
        check_saved(config, out / SAVED, [*keys, *again])
        OmegaConf.save(config, out / str(hydra_config.output_subdir) / SAVED.name)
        return config
    _check_source(composed, hydra_config)
    if composed.rerun.source is None:
        return composed
    source = Path(composed.rerun.source).expanduser()
    if not (source / SAVED).is_file():
        raise UserError(f"rerun.source={source} is no run directory: it has no .hydra/config.yaml.")
    config = load_saved(source / SAVED)
    said = [*(key for key in keys if key not in _OF_RERUN), "rerun"]
    overlay(config, composed, said)
    check_saved(config, source / SAVED, said)
    OmegaConf.save(config, out / SAVED)  # it is this run's config from now on
    return config


def saved_objective(source: str | None) -> str:
    """Return the metric by which a run that is done again is judged: that of the run itself.

    The default where there is no such run: the job itself says so, and its record has it.
    """
    path = Path(source).expanduser() / SAVED if source else SAVED
    try:
        if not (source and path.is_file()):
            return Config.objective
        config = load_saved(path)
        check_saved(config, path)
        return str(config.objective)
    except UserError:
        return Config.objective


def overlay(config: DictConfig, composed: DictConfig, keys: Iterable[str]) -> None:
    """Put what `composed` has under some keys into `config`, as it is written.

    References stay references: what `${oc.env:...}` stands for is not to be saved.
    """
    written = OmegaConf.to_container(composed, resolve=False)
    with open_dict(config):
        for key in keys:
            value = _at(written, key.split("."))
            if isinstance(value, dict):  # a section: the node knows its type, and resolves nothing
                value = OmegaConf.select(composed, key)
            OmegaConf.update(config, key, value, merge=False)


def _at(value: Any, names: list[str]) -> Any:
    """Return what stands under nested names, None where a key was taken out."""
    for name in names:
        if isinstance(value, list):
            value = value[int(name)]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def new_overrides(out: Path, hydra_config: HydraConf) -> list[str]:
    """Return the overrides that this call brought, without those saved with the run."""
    saved = _saved_overrides(out) if continues(out, hydra_config) else []
    # As they were written: a list of OmegaConf's would resolve ${oc.env:...} as it is walked.
    given: list[str] = OmegaConf.to_container(hydra_config.overrides.task)  # type: ignore
    # What stands in both changes nothing; but a later call always names the run anew.
    return [o for o in given if o not in saved or key_of(o) == "run_dir"]


def continues(out: Path, hydra_config: HydraConf) -> bool:
    """Say whether this call goes on with a run that has begun in `out`."""
    subdir = hydra_config.output_subdir
    return bool(subdir) and subdir != SAVED.parent.name and _has_begun(out)


@contextmanager
def told_of_places(out: Path, config: Config) -> Iterator[None]:
    """Around what opens places that a config names: add to an error where saved ones are found.

    A run's saved paths are those that were typed, relative to where that was, and this call may be
    from elsewhere.
    """
    try:
        yield
    except UserError as error:
        began, elsewhere = "", dict[str, Path]()
        with suppress(UserError, OSError, ValueError, OmegaConfBaseException):
            began = str(_at(_plain(out / _OF_HYDRA), ["hydra", "runtime", "cwd"]) or "")
            if began and Path(began) != Path.cwd():
                elsewhere = _left_elsewhere(out, config, Path(began))
        if not elsewhere:
            raise
        words = " ".join(f"{key}={place}" for key, place in elsewhere.items())
        raise UserError(
            f"{error} Saved paths of this run are relative to the folder in which it began, "
            f"{began}: give the command there, or add {words}."
        ) from error


def _left_elsewhere(out: Path, config: Config, began: Path) -> dict[str, Path]:
    """Return the saved relative paths that lead nowhere here, and to something where a run began.

    By their keys, as absolute paths.
    """
    saved, now = _plain(out / SAVED), to_dict(config)
    keys = [*_PLACES, *(f"dataset.sources.{name}.path" for name in config.dataset.sources)]
    found = {}
    for key in keys:
        value = _at(now, key.split("."))
        if not value or value != _at(saved, key.split(".")) or _leads_somewhere(Path(value)):
            continue
        if not Path(value).expanduser().is_absolute() and _leads_somewhere(began / value):
            found[key] = began / value
    return found


def _leads_somewhere(place: Path) -> bool:
    # Not pathlib's, which takes fewer patterns than are read here.
    return place.expanduser().exists() or bool(glob(str(place), recursive=True))  # noqa: PTH207


def _plain(path: Path) -> Any:
    return OmegaConf.to_container(load_yaml(path), resolve=False) if path.is_file() else {}


def _has_begun(run_dir: Path) -> bool:
    return (run_dir / SAVED).is_file() and (run_dir / _BEGUN).is_file()


def _refuse_hidden_run_dirs(argv: list[str]) -> None:
    """Refuse ways to name an existing run in which Hydra would write over its record.

    Raises:
        UserError: hydra.run.dir or hydra.sweep.dir has runs in it, or run_dir is no plain path;
            or nothing is named.
    """
    for override in overrides_in(argv):
        key, _, value = override.lstrip("+").partition("=")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and _has_runs(override):
            raise UserError(
                f"{override}: there are runs in that directory. Name one of them by run_dir to go "
                "on with it, or a sweep's by sweep_dir; or choose another directory."
            )
        if key in ("run_dir", "sweep_dir") and not value.strip("'\" "):
            raise UserError(f"{key}= is empty: name a directory, or leave it out.")
        if key == "run_dir" and "${" in value:
            raise UserError(f"{override}: give run_dir as a plain path, without ${{...}}.")


def _has_runs(override: str) -> bool:
    return any(Path(str(parsed(override).value())).glob(f"**/{SAVED}"))


def _run_dir(argv: list[str]) -> Path | None:
    named = [a for a in overrides_in(argv) if a.lstrip("+").startswith("run_dir=")]
    if not named:
        return None
    # By Hydra's own parser: it may be in quotes, and a blank may have a backslash before it.
    found = parsed(named[-1])
    value = named[-1].partition("=")[2] if found.is_sweep_override() else found.value()
    return Path(str(value))


def _check_logs(run_dir: Path) -> None:
    """Refuse logs that Hydra would add its lines to elsewhere, or wait for ever to open.

    Raises:
        UserError: one is a link, or a pipe or device.
    """
    for path in run_dir.glob("*.log"):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and lines are to be added there: remove it.")
        if not path.is_dir():
            check_regular(path)


def _saved_overrides(run_dir: Path) -> list[str]:
    path = run_dir / _OVERRIDES
    saved = _plain(path) if path.is_file() else []
    if not (isinstance(saved, list) and all(isinstance(one, str) for one in saved)):
        raise UserError(f"{path} is no list of overrides, as Hydra saves it: restore it.")
    for override in saved:
        found = parsed(override)
        check_override(found.package, found.key_or_group, override, path)
    return saved


def newest_saved(run_dir: Path) -> Path:
    """Return where the config of the newest call of a run is."""
    calls = (name for name in _later_calls(run_dir) if (run_dir / name / SAVED.name).is_file())
    return run_dir / max(calls, default=SAVED.parent.name, key=_number) / SAVED.name


def _next_subdir(run_dir: Path) -> str:
    # Above all that are there, in whatever order others made them: `newest_saved` is to find it.
    return f".hydra-{1 + max(map(_number, _later_calls(run_dir)), default=1)}"


def _later_calls(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.glob(".hydra-*") if _LATER_CALL.fullmatch(path.name)]


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])
