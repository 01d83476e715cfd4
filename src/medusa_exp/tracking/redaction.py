"""What is sent or passed on, without what is private: home paths, users and passwords in URLs."""

import re
import shlex
from pathlib import Path
from typing import Any

_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")


def shareable(value: Any) -> Any:
    """Return JSON-like `value` with the home directory as `~` and no user or token in a URL."""
    if isinstance(value, dict):
        return {shareable(key): shareable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    return shareable_text(value) if isinstance(value, str) else value


def shareable_text(text: str, home: str = "~") -> str:
    """Return `text` with `home` for the home directory and no user or token in a URL."""
    for path in _homes():
        text = re.sub(rf"{re.escape(path)}(?![\w.-])", lambda _: home, text)
    return _USER_INFO.sub("", text)


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
