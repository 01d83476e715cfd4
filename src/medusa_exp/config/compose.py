"""Turn what Hydra and OmegaConf compose into plain, checked dataclasses, and back."""

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from medusa_exp.config.privacy import without_environment
from medusa_exp.config.schema import Config
from medusa_exp.config.trust import check_hydra_nodes, check_size, load_yaml
from medusa_exp.errors import UserError

_WITH_KEYS_OF_USERS = (
    "dataset.columns",
    "dataset.role_map",
    "dataset.sources",
    "tokenizer.special_tokens",
)
"""What a command line may give keys without a `+` before it: names that no schema can know."""

_LONGEST_SAID = 300
_MISFITS = (OmegaConfBaseException, OverflowError)
Section = TypeVar("Section")


def register() -> None:
    """Make the schema known to Hydra under the name that `conf/config.yaml` starts from."""
    check_hydra_nodes()
    _register_demo()
    store = ConfigStore.instance()
    schema = OmegaConf.structured(Config)
    for key in _WITH_KEYS_OF_USERS:
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    store.store(name="base_config", node=schema)
    # For each group that --help lists, Hydra copies this store with all its nodes, a hundred times
    # in all and most of the time that it takes; it only reads the copies.
    store.__deepcopy__ = _only_store  # type: ignore[attr-defined]  # private: hydra 1.3


def _register_demo() -> None:
    """Let `${medusa_exp.demo:heads}` be where that part of the demo is installed."""
    place = Path(__file__).parents[1] / "demo"
    OmegaConf.register_new_resolver("medusa_exp.demo", lambda part: str(place / part), replace=True)


def _only_store(memo: dict[int, Any]) -> ConfigStore:
    return ConfigStore.instance()


def from_hydra(config: DictConfig) -> Config:
    """Turn a composed config into plain, checked dataclasses.

    Raises:
        UserError: naming the key and what it may be.
    """
    # Hydra lets `+key=value` add what no schema knows; merging into a fresh one does not.
    return checked_section(Config, OmegaConf.to_container(config, resolve=False))


def checked_section(section: type[Section], values: Any) -> Section:
    """Make a section of the config, or all of it, of plain values; references are resolved.

    Raises:
        UserError: naming the key and what it may be.
    """
    check_size(values)
    _register_demo()
    try:
        merged = OmegaConf.merge(OmegaConf.structured(section), values)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except _MISFITS as error:
        if unknown := unknown_key(error, of=section):
            raise UserError(unknown) from error
        said = _first_line(getattr(error, "msg", None) or error)
        if "is not a ListConfig" in said:
            said = "a list is wanted, in brackets"
        key = getattr(error, "full_key", None) or _misfit(section, values)
        raise UserError(f"{key}: {said[:_LONGEST_SAID]}") from error


def unknown_key(error: BaseException | None, of: type = Config) -> str | None:
    """Return what to tell of an error, or of what it was raised from, that is a mistyped key.

    Args:
        error: of OmegaConf's or Hydra's.
        of: the section that the key was looked for in.
    """
    seen = set()  # in a debugger OmegaConf's errors are their own causes
    while error is not None and not isinstance(error, ConfigAttributeError | ConfigKeyError):
        seen.add(id(error))
        error = error.__cause__ if id(error.__cause__) not in seen else None
    if error is None or not (key := error.full_key):
        return None
    known = list(_keys(OmegaConf.to_container(OmegaConf.structured(of))))
    as_deep = [name for name in known if name.count(".") == key.count(".")]
    begun = [name for name in as_deep if name.startswith(key)]
    near = begun[:1] or get_close_matches(key, as_deep, n=1, cutoff=0.8)
    if not near:  # its section may be left out, or be another's
        last = {name.rpartition(".")[2] for name in known}
        meant = get_close_matches(key.rpartition(".")[2], sorted(last), n=1)
        near = [name for name in known if name.rpartition(".")[2] in meant]
        near = sorted(near, key=lambda name: name.count("."))[:2]
    hint = f"did you mean {' or '.join(near)}?" if near else "`--cfg job` prints all there are."
    return f"{key}: there is no such key; {hint}"


def said_of(error: BaseException) -> str | None:
    """Return what to tell of an error of Hydra's that a user can mend; None of others."""
    return unknown_key(error) or _misfit_override(error)


def no_reference(error: OmegaConfBaseException) -> str:
    """Return what to tell of a reference in the command line's values that leads nowhere.

    Hydra meets it as it names the run directory, by the name of the run.
    """
    said = _first_line(error)
    return (
        f"{said} ({error.full_key} is made of it): name a key of the config, or a variable that is "
        "set, in ${...}, or write the value out."
    )


def _first_line(words: object) -> str:
    return [*str(words).splitlines(), ""][0]


def _misfit_override(error: BaseException) -> str | None:
    """Return what to tell of an error of Hydra's that is a value which its key cannot take.

    Args:
        error: of merging an override, which its text gives last.
    """
    cause, (_, found, override) = error.__cause__, _first_line(error).partition(" override ")
    if not (isinstance(cause, OmegaConfBaseException) and found):
        return None
    key, _, value = override.partition("=")
    is_of_it = cause.full_key in (None, key.lstrip("+"))
    if "is not a ListConfig" in str(cause):
        if is_of_it:
            return f"{override}: {cause.full_key} is a list: write '{key}=[{value}]'."
        return f"{override}: a list, in brackets, is wanted at {cause.full_key}."
    place = "" if is_of_it else f" {cause.full_key}:"
    return f"{override}:{place} {_first_line(cause.msg or cause)}."


def _keys(section: Any, before: str = "") -> Iterator[str]:
    """Yield each key of nested values, with dots; a section before what is in it."""
    for name, value in section.items() if isinstance(section, dict) else ():
        yield before + name
        yield from _keys(value, f"{before}{name}.")


def _misfit(section: type, values: dict[str, Any]) -> str:
    """Return the first key whose value is none for it: of some OmegaConf does not say which."""
    hints = get_type_hints(section)
    for name, value in values.items():
        try:
            OmegaConf.merge(OmegaConf.structured(section), {name: value})
        except _MISFITS:
            inner = hints.get(name)
            if isinstance(value, dict) and is_dataclass(inner) and isinstance(inner, type):
                return f"{name}.{_misfit(inner, value)}"
            return name
    return "config"


def from_dict(values: dict[str, Any]) -> Config:
    """Turn what `to_dict` gave, perhaps in another process, into the checked config again."""
    return checked_section(Config, values)


def checked_again(config: Config) -> Config:
    """Return a config that Python code has changed since it was composed, checked as it was then.

    Raises:
        UserError: naming the key and what it may be.
    """
    return from_dict(_as_written(asdict(config)))


def _as_written(value: Any) -> Any:
    """Return values such that none is taken for a reference: they have been resolved."""
    if isinstance(value, dict):
        return {key: _as_written(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_as_written, value)]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def load_saved(path: Path) -> DictConfig:
    """Read a run's saved config against today's schema.

    Raises:
        UserError: the file is unreadable, or holds a key that the schema does not know.
    """
    try:
        # Places that Hydra made of the clock: nobody else could read them.
        placed = {"run_dir": str(path.parents[1]), "sweep_dir": ""}
        saved = load_yaml(path)
        head = saved.get("head") or {}
        if "own_projections" not in head and head.get("kind") in ("recurrent", "auto"):
            saved["head"]["own_projections"] = False  # as it was before there was a choice
        return OmegaConf.merge(OmegaConf.structured(Config), saved, placed)  # type: ignore
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} does not fit this version of medusa_exp: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested plain values, for W&B and for cache keys."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def to_shareable(config: Config, saved: Path) -> dict[str, Any]:
    """Return the config as `to_dict` does, without what came from environment variables.

    `saved` is the config as Hydra composed it, where such a value is still `${oc.env:NAME}`.
    """
    return without_environment(to_dict(config), saved)
