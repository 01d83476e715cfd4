"""The text of a JSON list in; its records, undecoded, out."""

import re
from collections.abc import Iterator

import msgspec

from medusa_exp.data import faults
from medusa_exp.data.parsing import RawRecord

_decode = msgspec.json.Decoder(list[msgspec.Raw]).decode

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|NaN|Infinity', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_CONTROLS = bytes({*range(32)} - {*b"\r\n"})  # a line break means a missing quote
_BLANKED = bytes.maketrans(_CONTROLS, b" " * len(_CONTROLS))


def list_records(name: str, text: memoryview) -> Iterator[RawRecord]:
    """Yield the records of a JSON list, each as a view of its text.

    Raises:
        DataError: it is no JSON list; says where.
    """
    try:
        yield from _decode(text)
        return
    except (msgspec.DecodeError, RecursionError) as error:
        mended = _without_oddities(text)
        if mended is None:
            raise faults.not_json(name, text, error) from error
    yield from _records_as_in(name, mended, text)


def _records_as_in(name: str, mended: bytearray, text: memoryview) -> Iterator[memoryview]:
    """Yield the parts of `text` where `mended`, of the same length, has its records."""
    try:
        records = _decode(mended)
    except (msgspec.DecodeError, RecursionError) as error:
        raise faults.not_json(name, memoryview(mended), error) from error
    end = 0
    gap = re.compile(rb"\s*\[\s*")
    for record in records:
        start = gap.match(mended, end).end()  # type: ignore[union-attr]  # it has been parsed
        end = start + len(memoryview(record))
        yield text[start:end]
        gap = re.compile(rb"\s*,\s*")


def _without_oddities(text: memoryview) -> bytearray | None:
    """Return a copy in which other characters stand where JSON allows none, None without any.

    These are bare NaN and infinities (of Python's json), halves of surrogate pairs, and control
    characters. For one of them msgspec refuses the whole list, even where it need not decode it.
    """
    mended = None
    for token in _TOKEN.finditer(text):
        found = token[0]
        if not found.startswith(b'"'):
            mended = mended or bytearray(text)
            mended[slice(*token.span())] = b"0e".ljust(len(found), b"0")
        elif _SURROGATE.search(found) or len(found.translate(None, _CONTROLS)) < len(found):
            mended = mended or bytearray(text)
            harmless = _SURROGATE.sub(rb"\\ufffd", found).translate(_BLANKED)
            mended[slice(*token.span())] = harmless
    return mended
