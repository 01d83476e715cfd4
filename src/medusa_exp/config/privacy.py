"""What may leave this machine: no value of an environment variable, no home path, no password.

What a config has from the environment is shown as `${oc.env:NAME}`, the home directory as `~`, and
a URL without its user, and *** for its tokens and keys.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from medusa_exp.config.reading import read_bytes
from medusa_exp.config.trust import OF_SECRETS, load_yaml
from medusa_exp.errors import UserError

_RESOLVER = "oc.env"
_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)")
_SHORTEST = 4
"""Shorter values stand in any text by chance, and are no secrets."""
_USER_INFO = re.compile(r"(?<=://)[^/\s?#]+@")
_URL = re.compile(r"://[^\s\"'<>\\]+")
"""Up to what ends one in JSON, HTML or a shell, which have to stay whole."""
_PARAMETER = re.compile(r"([?&;][\w.-]*+=)[^&;#]+")


def without_environment(plain: dict[str, Any], saved: Path) -> dict[str, Any]:
    """Return a resolved config with `${oc.env:NAME}` wherever an environment variable had a part.

    `saved` is the same as Hydra composed it, with its references. They are followed rather than
    sent, so that a value which refers to another key is the value that the run had.
    """
    if not saved.is_file():
        return plain
    written = load_yaml(saved)
    with _variables_as_their_names():
        return {key: _shown(value, written, key) for key, value in plain.items()}


def named_variables(text: str, out: Path) -> str:
    """Return `text` with `${oc.env:NAME}` for what the variables in a run's config stand for.

    `text` may be a message that quotes a value of the config; `out` is the run directory.
    """
    names = {name for path in out.glob(".hydra*/config.yaml") for name in _variables_in(path)}
    values = {name: os.environ.get(name, "") for name in names}
    for name, value in sorted(values.items(), key=lambda item: -len(item[1])):
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"${{{_RESOLVER}:{name}}}")
    return text


def _variables_in(path: Path) -> list[str]:
    """Return the variables that a config refers to; none where it is not to be read."""
    with suppress(UserError):  # said where it is needed
        return _REFERENCE.findall(read_bytes(path).decode(errors="replace"))
    return []


@contextmanager
def _variables_as_their_names() -> Iterator[None]:
    """Let references to variables resolve to themselves, and what refers to these follow suit."""

    def name_it(*arguments: Any) -> str:
        words = ("null" if argument is None else str(argument) for argument in arguments)
        return f"${{{_RESOLVER}:{','.join(words)}}}"

    OmegaConf.register_new_resolver(_RESOLVER, name_it, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver(_RESOLVER, oc.env, replace=True)


def _shown(value: Any, parent: Any, key: Any) -> Any:
    """Return `value`, or what stands for it, of the node under `key` as it is written."""
    try:
        written = parent[key] if isinstance(parent, DictConfig | ListConfig) else None
    except (OmegaConfBaseException, IndexError):  # such as ${hydra:...}, which no variable is
        written = None
    if isinstance(written, str) and f"${{{_RESOLVER}:" in written:
        return written
    if isinstance(value, dict):
        return {name: _shown(item, written, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_shown(item, written, place) for place, item in enumerate(value)]
    return value


def shareable(value: Any) -> Any:
    """Return JSON-like `value` with `~` for the home directory, no user, token or key in a URL."""
    if isinstance(value, dict):
        return {shareable(key): shareable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    return shareable_text(value) if isinstance(value, str) else value


def shareable_text(text: str, home: str = "~") -> str:
    """Return `text` with `home` for the home directory and no user, token or key in a URL."""
    for path in _homes():
        text = re.sub(rf"{re.escape(path)}(?![\w.-])", lambda _: home, text)
    return without_secrets(text)


def without_secrets(text: str) -> str:
    """Return `text` with no user or password in a URL, and *** for its tokens and keys."""
    bare = _USER_INFO.sub("", text)
    return _URL.sub(lambda url: _PARAMETER.sub(_hidden, url[0]), bare)


def _hidden(parameter: re.Match[str]) -> str:
    return f"{parameter[1]}***" if OF_SECRETS.search(parameter[1]) else parameter[0]


def bare_remote(remote: str) -> str:
    """Return the address of a git remote without user, password or token, however it is written."""
    users = r"(?<=://)\S*@" if "://" in remote else r"\A[^@/\s]*:[^@\s]*@"
    return shareable_text(re.split("[?#]", re.sub(users, "", remote))[0])


def by_name(files: dict[str, str]) -> dict[str, str]:
    """Return path -> digest as name -> digest: the folders of a path may be private.

    Files of one name are numbered: `a.json`, `a.json (2)`.
    """
    named: dict[str, str] = {}
    for path, digest in files.items():
        name, number = Path(path).name, 1
        while (unique := name if number == 1 else f"{name} ({number})") in named:
            number += 1
        named[unique] = digest
    return named


def shell_command(arguments: list[str]) -> str:
    """Return a command to be pasted into a shell, in anybody's home: there is $HOME for it."""
    return " ".join(map(_shell_word, arguments))


def _shell_word(word: str) -> str:
    marked = shareable_text(word, home="\0")
    if "\0" not in marked:
        return shlex.quote(marked)
    in_quotes = re.sub(r'([\\"`$])', r"\\\1", marked)
    return '"' + in_quotes.replace("\0", "$HOME") + '"'


def _homes() -> list[str]:
    """Return the home directory as it is named and as it resolves; `/` says nothing of anybody."""
    home = Path.home()
    return [path for path in dict.fromkeys((str(home), str(home.resolve()))) if path != "/"]
