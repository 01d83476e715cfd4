"""What a saved run and an experiment's YAML may not say: both are data, which others may have made.

A saved run is continued as it is described, but what reaches beyond it has to be said again on the
command line: the model's own code, the environment, a place to write at outside, a key to send. No
file may bring Hydra nodes that name code; Hydra's own plugins, and our one callback, stay.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.config_loader_impl import ConfigLoaderImpl  # private: hydra 1.3
from hydra._internal.config_repository import ConfigRepository  # private: hydra 1.3
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medusa_exp.config.reading import MOST_VALUES, read_yaml_text
from medusa_exp.errors import UserError

_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
_REFERENCE = re.compile(r"\$\{[^${}:]*\}")
_USER = re.compile(r"://(?=([^/?#:]*+:)(?!\d++[/?#]))")  # not a host and its port
_TOKEN = re.compile(r"://[^/?#:$]{12,}+\Z")
_PARAMETER = re.compile(r"[?&;]([\w.-]*+)=(?=[^&$])")
OF_SECRETS = re.compile(r"key|token|secret|passw|signature|\bsig\b|credential", re.IGNORECASE)
"""In the name of a parameter whose value is a secret. Such as `max_tokens` it finds too."""
_NAME_OF_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_KEY_ITSELF = re.compile(r"(hf|sk|ghp|gsk|xai)_\w{12,}|\w{48,}")
_HARMLESS = ("now", "medusa_exp.demo", "medusa_exp.saved_objective")
_NAMES_CODE = ("_target_", "class", "()", "factory")
"""Keys by which Hydra, or `logging.config`, find something to call."""
_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.", "optuna.samplers.")
_LOGGING = ("logging.StreamHandler", "logging.FileHandler", "colorlog.ColoredFormatter")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_OWN_PLACES = ("${hydra.runtime.output_dir}/", "${hydra.sweep.dir}/")
"""Where a log may go."""
_CALLBACK = "medusa_exp.runs.sweep._StartedSweeps"
_IN_PYTHON = {
    "model.trust_remote_code": "; from Python, Decoder.from_run(..., trust_remote_code=True)"
}
_OF_SHELL = re.compile(r"(PATH|LD_|DYLD_|PYTHON|GIT_|BASH_ENV|ENV$|HOME$)")
"""Variables by which our own calls of git, or later processes, would run something else."""


def load_yaml(path: Path) -> Any:
    """Read YAML that a run has saved, as OmegaConf does.

    Raises:
        UserError: it is none, too large, or has aliases, which grow beyond any size when expanded.
    """
    text = read_yaml_text(path, aliases=False)
    try:
        return OmegaConf.create(text)
    except (ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {error}. Restore it.") from error
    except AssertionError as error:  # OmegaConf's own, of a lone number
        raise UserError(f"{path} is no list, and no object of keys: restore it.") from error


def check_saved(config: DictConfig, path: Path, said: Collection[str] = ()) -> None:
    """Check what a saved config, read from `path`, asks for beyond its own run.

    Args:
        config: as saved, with what this call says on top.
        path: of its file.
        said: keys and groups that this call names.

    Raises:
        UserError: it asks for something that this call does not; names the key.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    values = {key: value for key, value in _leaves(plain) if not _is_said(key, said)}
    for key, value in values.items():
        foreign = _resolvers(value) - set(_HARMLESS) if isinstance(value, str) else ()
        if foreign:
            raise UserError(
                f"{path}: {key}={value} looks something up where it is read ({', '.join(foreign)}),"
                f" which a saved run may not: say {key}=... again on this command line."
            )
    out, run_dir = values.get("export.out"), path.resolve().parents[1]
    # Neither is resolved here: a reference may be to anything.
    is_outside = "${" in str(out) or not Path(str(out)).resolve().is_relative_to(run_dir)
    stages = plain["stages"]
    exports = "export" in stages or "${" in str(stages)
    asks = plain["regenerate"]["server"] or plain["evaluate"]["server"]
    for key, is_refused, what in (
        ("model.trust_remote_code", True, "would run Python code that comes with the model"),
        ("export.out", is_outside and exports, "writes outside of the run"),
        ("serving.key_variable", bool(asks), "would send that variable to a server"),
    ):
        if values.get(key) and is_refused:
            raise UserError(
                f"{path}: {key}={values[key]} {what}, which a saved run cannot decide: say "
                f"{key}={values[key]} again on this command line if you want it, or another value"
                f"{_IN_PYTHON.get(key, '')}."
            )


def _resolvers(text: str) -> set[str]:
    """Return what OmegaConf would look up by a function; parts of its name may be references."""
    number = 1
    while number:
        text, number = _REFERENCE.subn("_", text)
    return set(_RESOLVER.findall(text))


def _is_said(key: str, said: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in said)


def check_override(package: str | None, key: str, override: str, path: Path) -> None:
    """Raise a UserError where an override that was saved, in `path`, sets something of Hydra's."""
    words = [*re.split(r"[./]", key.lstrip("/"))[:1], *(package or "").split(".")]
    if "hydra" in words:
        raise UserError(
            f"{path}: {override} would set something of Hydra's, which can run code, and which no "
            "run has saved there: take that line out, or start a new run."
        )


def check_size(values: Any) -> None:
    """Raise a UserError where a config holds more than any does: OmegaConf would take hours."""
    for number, (key, _) in enumerate(_leaves(values)):
        if number > MOST_VALUES:
            raise UserError(
                f"{key}: the config holds more than {MOST_VALUES:,} values up to there: shorten it."
            )


def check_hydra_nodes() -> None:
    """Have every file that Hydra reads from now on checked, and every config that it composes,
    before Hydra acts by it."""
    load: Callable[..., DictConfig] = ConfigLoaderImpl.load_configuration
    if hasattr(load, "is_checked"):
        return

    def load_checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        try:
            config = load(self, *args, **kwargs)
        except (OverflowError, RecursionError, ValueError) as error:
            if isinstance(error, OmegaConfBaseException):
                raise
            # A number of 400 digits, or 5,000; brackets in brackets.
            raise ConfigCompositionException(f"a value cannot be read: {error}") from error
        _check_passwords(OmegaConf.to_container(config, resolve=False))
        if "hydra" in config:
            _check_nodes(OmegaConf.to_container(config.hydra, resolve=False))
        return config

    load_checked.is_checked = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = load_checked  # type: ignore[method-assign]
    read: Callable[[ConfigRepository, str], Any] = ConfigRepository.load_config

    def read_checked(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is not None and source.scheme() == "file":  # others are parts of packages
            try:
                read_yaml_text(Path(source.path, source._normalize_file_name(config_path)))
            except UserError as error:
                raise ConfigCompositionException(str(error)) from error
        return read(self, config_path)

    ConfigRepository.load_config = read_checked  # type: ignore[method-assign]


def _check_passwords(node: Any) -> None:
    """Refuse a password in an address: Hydra would write it into the run directory, for good.

    And a key in the place of its variable's name.
    """
    for key, value in _leaves({name: node[name] for name in node if name != "hydra"}):
        if not isinstance(value, str):
            continue
        if _has_secret(value):
            raise ConfigCompositionException(
                f"{key} is an address with a password or key, which the run directory would keep: "
                "put the address into a variable of the environment, and give "
                f"'{key}=${{oc.env:NAME}}'."
            )
        is_name = _NAME_OF_VARIABLE.fullmatch(value) and not _KEY_ITSELF.fullmatch(value)
        if key == "serving.key_variable" and value and "${" not in value and not is_name:
            raise ConfigCompositionException(
                f"{key} is the name of an environment variable that holds the key, not the key "
                "itself, which the run directory would keep."
            )


def _has_secret(text: str) -> bool:
    """Does an address in a text hold a password or key? In a time that grows as the text does."""
    return any(_is_secret(word) for word in text.split() if "://" in word)


def _is_secret(word: str) -> bool:
    for piece in word.split("@")[:-1]:
        # Whatever a password has in it, but no reference; or a token in the place of the user.
        rest, end = piece.rfind("$"), len(piece)
        if any(rest < user.end(1) < end for user in _USER.finditer(piece)) or _TOKEN.search(piece):
            return True
    names = _PARAMETER.findall(word.partition("://")[2])
    return any(map(OF_SECRETS.search, names))


def _check_nodes(node: Any) -> None:
    for key, value in _leaves(node):
        place, _, name = key.rpartition(".")
        section = place.split(".")[0]
        text = value if isinstance(value, str) else ""
        if name in _NAMES_CODE and text:
            may = text.startswith(_PLUGINS) if section in ("launcher", "sweeper") else False
            may |= text in _LOGGING and section in ("job_logging", "hydra_logging")
            _refuse_unless(may or text == _CALLBACK, key, text, "names code to run")
        if section in ("job_logging", "hydra_logging"):
            _refuse_unless("ext://" not in text or text in _STREAMS, key, text, "names code to run")
            is_own = text.startswith(_OWN_PLACES) and ".." not in text
            _refuse_unless(name != "filename" or is_own, key, text, "writes outside of the run")
        if key == "job.name":
            _refuse_unless("/" not in text, key, text, "writes outside of the run")
        if place == "job.env_set":
            _refuse_unless(not _OF_SHELL.match(name), key, text, "changes which programs run")


def _refuse_unless(is_fine: bool, key: str, value: str, what: str) -> None:
    if not is_fine:
        raise ConfigCompositionException(
            f"hydra.{key}={value} {what}, which no config may: take it out of the YAML file or the "
            "command line. Variables can be set in the shell."
        )


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested dictionaries and lists under its path, with dots."""
    if isinstance(node, dict | list):
        named = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in named:
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, node
