"""What leaves this machine, without what is nobody's business: home paths, passwords in URLs."""

import re
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


def shareable_text(text: str) -> str:
    """Return `text` with the home directory as `~` and no user or token in a URL."""
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return _USER_INFO.sub("", text)


def _homes() -> list[str]:
    """Return the home directory as it is named and as it resolves; `/` says nothing of anybody."""
    home = Path.home()
    return [path for path in dict.fromkeys((str(home), str(home.resolve()))) if path != "/"]
