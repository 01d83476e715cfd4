"""A raw chat as a file holds it, not yet understood: its text or a table's row, and their size."""

import json
import re
from typing import Any

import msgspec

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class TooLong(msgspec.Struct, frozen=True):
    """Stands for a line that is longer than a record may be: it was not kept."""

    num_bytes: int


RawChat = msgspec.Raw | bytes | memoryview | dict[str, Any] | TooLong
"""JSON text, or the row of a table."""


def raw_bytes(raw: RawChat) -> bytes:
    """Return the text of a raw chat; of a row, its text as JSON."""
    if isinstance(raw, TooLong):
        return b""
    return msgspec.json.encode(raw) if isinstance(raw, dict) else bytes(raw)


def num_bytes(raw: RawChat) -> int:
    """Return the length of that text; of a row, about: JSON's marks and escapes are not counted."""
    if isinstance(raw, TooLong):
        return raw.num_bytes
    return _size(raw) if isinstance(raw, dict) else memoryview(raw).nbytes


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value) + 2
    if isinstance(value, dict):
        return sum(len(key) + 4 + _size(inner) for key, inner in value.items())
    return sum(map(_size, value)) + 2 if isinstance(value, list) else 4


def whole_letters(text: str) -> str:
    """Return a text with U+FFFD for halves of surrogate pairs, which are in no encoding."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def decode_leniently(text: bytes) -> Any:
    """Decode what Python's json takes, which is more than JSON.

    Raises:
        ValueError: it is not JSON by any measure, or (UnicodeDecodeError) not UTF-8.
        RecursionError: it is nested too deeply.
    """
    letters = text.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
    return json.loads(letters, strict=False, parse_int=_number)


def _number(digits: str) -> int | float:
    """Return a whole number, infinite where it has more digits than Python makes an int of."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)
