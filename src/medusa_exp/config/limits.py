"""What a config key may be: declared with its field, and checked when a section is made.

Every number has two bounds. The upper ones are beyond what anybody has had a use for, and below
what would never end or find memory: a slip of a digit is told at once, and not by hours of work.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from medusa_exp.errors import UserError

_MOST_VALUES = 256
"""Entries of a list of numbers."""
_LONGEST_TEXT = 1 << 18


@dataclass(frozen=True)
class OneOf:
    """A key that takes one of some words."""

    words: tuple[str, ...]

    def check(self, key: str, value: str) -> None:
        """Raise a UserError unless the value is one of them."""
        if value not in self.words:
            raise UserError(
                f"{key}={_shown(value)} is not known: use one of {', '.join(self.words)}."
            )


@dataclass(frozen=True)
class NotBelow:
    """A number that must be at least `bound`, which another key may set."""

    bound: float

    def check(self, key: str, value: float) -> None:
        """Raise a UserError unless the value is."""
        if not value >= self.bound:
            raise UserError(f"{key}={value} is too small: it must be at least {self.bound}.")


@dataclass(frozen=True)
class Between:
    """A number between two others, both included."""

    low: float
    high: float

    def check(self, key: str, value: float) -> None:
        """Raise a UserError unless the value is."""
        if not self.low <= value <= self.high:
            raise UserError(
                f"{key}={_shown(value)} is out of range: it must lie between {self.low} and "
                f"{self.high}."
            )


@dataclass(frozen=True)
class Given:
    """A name or a path: an empty one, as of a shell's variable that is not set, is a slip."""

    def check(self, key: str, value: str) -> None:
        """Raise a UserError where there is nothing in it."""
        if not value.strip():
            raise UserError(f"{key} is empty: give one, or leave {key} out.")


@dataclass(frozen=True)
class Addresses:
    """URLs of servers, with commas between them; what asks the servers looks closer."""

    def check(self, key: str, value: str) -> None:
        """Raise a UserError where one is none; it is not shown, for it may have a password."""
        if not all(_ADDRESS.match(one.strip()) for one in value.split(",")):
            raise UserError(f"{key} is no URL of a server: http://HOST:PORT is one.")


Limit = OneOf | NotBelow | Between | Given | Addresses
_ADDRESS = re.compile(r"https?://[^/\s?#]", re.IGNORECASE)
_FIRST: Any = object()


def choice(*words: str, default: Any = _FIRST) -> Any:
    """Declare a key that takes one of these words: the first, where no other default is given."""
    return _key(words[0] if default is _FIRST else default, OneOf(words))


def between(low: float, high: float, *, default: Any) -> Any:
    """Declare a number, or a list of numbers, between two others, both included.

    A list may be empty where its default is; lists of lists are of such numbers too.
    """
    return _key(default, Between(low, high))


def given(default: Any = None) -> Any:
    """Declare a name or a path, which is not empty where it is given."""
    return _key(default, Given())


def addresses() -> Any:
    """Declare URLs of running servers; null by default."""
    return _key(None, Addresses())


def _key(default: Any, limit: Limit) -> Any:
    if isinstance(default, list):
        metadata = {"limit": limit, "may_be_empty": not default or isinstance(limit, OneOf)}
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata={"limit": limit})


def words_of(section: type, key: str) -> tuple[str, ...]:
    """Return the words that a key of a section may be."""
    [limit] = [field.metadata["limit"] for field in fields(section) if field.name == key]
    assert isinstance(limit, OneOf)
    return limit.words


def check(section: Any, place: str) -> None:
    """Check each key of a section against its declaration; null, where a key may be null, passes.

    Raises:
        UserError: naming the key, as `place` and the field's name, and what it may be.
    """
    for key in fields(section):
        limit, value = key.metadata.get("limit"), getattr(section, key.name)
        name = f"{place}.{key.name}" if place else key.name
        for one in _values(value):
            _check_text(name, one)
        if key.type == list[str] and not all(isinstance(one, str) for one in value):
            raise UserError(f"{name} is a list of texts, and holds another list: give [a, b].")
        if limit is None or value is None:
            continue
        if value == [] and not key.metadata["may_be_empty"]:
            raise UserError(f"{name} is empty: give one number at least, as [1].")
        if isinstance(value, list) and len(value) > _MOST_VALUES:
            raise UserError(f"{name} has {len(value)} entries: give {_MOST_VALUES} at most.")
        for one in _values(value):
            limit.check(name, one)


def _values(value: Any) -> Iterator[Any]:
    """Yield a value, or those of a list or a dictionary; of those in it too."""
    if isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _values(one)
    else:
        yield value


def _check_text(name: str, value: Any) -> None:
    """Raise a UserError for text that no file system, and no program that is called, can take."""
    if not isinstance(value, str):
        return
    if "\0" in value:
        raise UserError(f"{name} has a character of code 0 in it: take it out.")
    if len(value) > _LONGEST_TEXT:
        raise UserError(f"{name} is a text of {len(value):,} characters: it must be shorter.")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no file can be written with it
        raise UserError(f"{name}={_shown(value)} is no text of Unicode: write it anew.") from None


def _shown(value: Any) -> str:
    text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else "a larger number"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:80]}..."
