"""Records of files that are not a list of them: CSV and TSV, and one object of lists or of objects.

An object may hold lists of records (`{"train": [...], "test": [...]}`), columns (`{"prompt": [...],
"completion": [...]}`, as pandas writes them too), rows beside the names of their columns, or
records by their ids.
"""

import csv
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import msgspec

from medusa_exp.data import faults, record_faults
from medusa_exp.data.faults import DataError
from medusa_exp.data.parsing import NO_FORM, NOT_A_TURN, ChatParser, value_of
from medusa_exp.data.raw_chats import RawChat, decode_leniently
from medusa_exp.data.records import Ambiguous
from medusa_exp.data.turn_lists import WRAPPERS, is_turn
from medusa_exp.data.turns import Unusable

log = logging.getLogger(__name__)

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def rows_of_text(name: str, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of CSV or TSV, told apart by their header, with the line that each ends in.

    Raises:
        DataError: a row has more fields than there are columns, a quote has no end, two columns
            have one name, or it is not UTF-8.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the process: 131072 is no chat's limit
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            lines = _Lines(text)
            header, delimiter = _header(name, lines)
            before = lines.number - 1
            reader = csv.reader(chain([header], lines), delimiter=delimiter)
            columns = next(reader, [])
            if lines.is_done and columns:
                raise _open_quote(name, lines.number)
            if twice := [name for name in columns if columns.count(name) > 1 and name]:
                raise record_faults.same_columns(name, twice[0])
            is_first = True
            for row in reader:
                line = before + reader.line_num
                if lines.is_done and row:
                    raise _open_quote(name, line)
                if len(row) > len(columns):
                    raise DataError(
                        f"{name}, line {line}: a row of {len(row)} fields under {len(columns)} "
                        f"columns ({', '.join(columns)}). Put texts with commas in quotes."
                    )
                if is_first:
                    is_first = False
                    _refuse_printed_messages(name, dict(zip(columns, row, strict=False)))
                if row:
                    yield line, {**dict.fromkeys(columns), **dict(zip(columns, row, strict=False))}
        except UnicodeDecodeError as error:
            raise faults.wrong_bytes(name, error.object) from error
        except csv.Error as error:
            raise DataError(f"{name}, line {lines.number}: {error}.") from error


def _header(name: str, lines: "_Lines") -> tuple[str, str]:
    """Return the header's first line, and what stands between its columns."""
    header = next((line for line in lines if line.strip()), "")
    if said := re.fullmatch(r'"?sep=(.)"?\s*', header, re.IGNORECASE):  # as Excel writes and reads
        return next((line for line in lines if line.strip()), ""), said[1]
    unquoted = re.sub(r'"[^"]*"?', "", header)
    if "\t" in unquoted and faults.unpacked_name(name.lower()).endswith(".tsv"):
        return header, "\t"
    delimiter = max(",\t;", key=unquoted.count)
    return header, delimiter if delimiter in unquoted or "|" not in unquoted else "|"


def _refuse_printed_messages(name: str, row: dict[str, str]) -> None:
    """Refuse questions and answers that both are messages as Python prints them: no text is so.

    Raises:
        NoChats: they are.
    """
    found = [
        error
        for key in ("prompt", "completion", "chosen", "rejected")
        if row.get(key, "").rstrip().endswith(("}]", "dtype=object)"))
        and (error := record_faults.not_json_list(name, key, row[key]))
    ]
    if len(found) > 1:
        raise found[0]


def _open_quote(name: str, line: int) -> DataError:
    """Return the error of a row for whose end another line was asked for, and there was none."""
    return DataError(
        f"{name}, line {line}: the last row has a quote without an end, which may have begun many "
        "lines before: close it."
    )


class _Lines:
    """The lines of a text: how many there were, and whether one more was asked for in vain."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.number, self.is_done = 0, False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline()
        if not line:
            self.is_done = True
            raise StopIteration
        self.number += 1
        return line


def records_of_object(
    name: str, text: Any, columns: Mapping[str, str] | None = None
) -> Iterable[RawChat] | None:
    """Return the records that the file's only JSON value holds, or None where it is one itself.

    `columns` are dataset.columns, by which records may be read.
    """
    is_chat = partial(_is_chat, columns=columns)
    try:
        fields = _decode_object(text)
        if (rows := _named_rows(fields)) is not None:
            return rows
        lists = {key: _decode_list(value) for key, value in fields.items() if _opens(value, b"[")}
        is_table = len(lists) == len(fields) > 1 and len({*map(len, lists.values())}) == 1
        if is_table and _are_columns_of_chats(lists, is_chat):
            return _rows(lists)
        if is_chat({**fields, **{key: items[:1] for key, items in lists.items()}}):
            return None
        of_records = {key: items for key, items in lists.items() if items and _is_record(items[0])}
        if of_records:
            if len(of_records) > 1:
                log.warning("data: %s: chats are read from its %s", name, ", ".join(of_records))
            return [item for items in of_records.values() for item in items]
        if is_table:
            return _rows(lists)
        objects = {k: _decode_object(v) for k, v in fields.items() if _opens(v, b"{")}
        if len(objects) == 1 and (inner := _wrapped(name, fields[next(iter(objects))], columns)):
            return inner
        if not objects or len(objects) < len(fields) or not fields.keys().isdisjoint(WRAPPERS):
            return None
        first, *others = objects.values()
        if is_chat(first):
            return list(fields.values())
        if len(objects) > 1 and all(other.keys() == first.keys() for other in others):
            rows = _rows({key: list(values.values()) for key, values in objects.items()})
            return rows if rows and is_chat(rows[0]) else None
    except (msgspec.DecodeError, RecursionError, ValueError, Unusable):
        pass  # what is wrong with it is found where it is read as a chat
    return None


def _wrapped(name: str, text: Any, columns: Mapping[str, str] | None) -> list[RawChat] | None:
    """Return the chats within the only object of an object, as an interface answers with them."""
    found = records_of_object(name, text, columns)
    inner = None if found is None else list(found)
    return inner if inner and _is_chat(inner[0], columns) else None


def records_within(name: str, text: Any) -> list[RawChat]:
    """Return the records, whatever they are, in the only object of an object, at any depth."""
    try:
        while True:
            objects = [v for v in _decode_object(text).values() if _opens(v, b"{")]
            if len(objects) != 1:
                return []
            text = objects[0]
            if found := records_of_object(name, text):
                return list(found)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return []


class _Served(msgspec.Struct):
    """A row as the hub's data-set server gives it."""

    row_idx: int
    row: msgspec.Raw


_decode_names = msgspec.json.Decoder(list[str]).decode
_decode_table = msgspec.json.Decoder(list[list[msgspec.Raw]]).decode
_decode_served = msgspec.json.Decoder(list[_Served]).decode


def _named_rows(fields: dict[str, msgspec.Raw]) -> list[Any] | None:
    """Return the rows of a table beside the names of its columns, or beside its features."""
    try:
        if "features" in fields and "rows" in fields:
            return [item.row for item in _decode_served(fields["rows"])]
        if "columns" not in fields or "data" not in fields:
            return None
        names, rows = _decode_names(fields["columns"]), _decode_table(fields["data"])
    except msgspec.ValidationError:
        return None
    if len({*names}) < len(names) or any(len(row) != len(names) for row in rows):
        return None
    return [msgspec.json.encode(dict(zip(names, row, strict=True))) for row in rows]


def _opens(value: msgspec.Raw, bracket: bytes) -> bool:
    return bytes(memoryview(value)[:1]) == bracket


def _rows(columns: dict[str, list[msgspec.Raw]]) -> list[bytes]:
    """Turn columns of one length into rows."""
    rows = zip(*columns.values(), strict=True)
    return [msgspec.json.encode(dict(zip(columns, row, strict=True))) for row in rows]


def _are_columns_of_chats(
    columns: dict[str, list[msgspec.Raw]], is_chat: Callable[[Any], bool]
) -> bool:
    """Is the first row of columns of one length a chat, and no column turns of one chat?"""
    for row in _rows({key: items[:1] for key, items in columns.items()}):
        return is_chat(row) and not any(map(is_turn, decode_leniently(row).values()))
    return False


def _is_chat(value: Any, columns: Mapping[str, str] | None) -> bool:
    """Is it a chat by dataset.columns, if there are any, or in a form that is known?"""
    raw = value if isinstance(value, bytes) else msgspec.json.encode(value)
    parsers = [ChatParser(columns=columns), ChatParser()] if columns else [ChatParser()]
    try:
        return any(parser.parse(raw) not in (NO_FORM, NOT_A_TURN) for parser in parsers)
    except Ambiguous:  # said, with its place, where it is read as one
        return True


def _is_record(item: msgspec.Raw) -> bool:
    value = value_of(item)
    return isinstance(value, list) or (isinstance(value, dict) and not is_turn(value))
