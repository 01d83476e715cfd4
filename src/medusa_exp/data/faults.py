"""What is wrong with a chat file that cannot be read, and what to do: messages of `DataError`."""

import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medusa_exp.data.other_kinds import kind_by_beginning
from medusa_exp.errors import UserError
from medusa_exp.runs.extras import lacking

log = logging.getLogger(__name__)

_CHATS = (
    "Chats are a JSON list or JSON Lines of records like "
    '{"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}.'
)

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Ends of the names of files that are packed."""
_NEVER_EMPTY = (".parquet", ".arrow", ".feather", ".zip", ".tar", ".tgz", ".tbz2", ".txz")
"""Ends of the names of files that have bytes even where they hold nothing."""

# JSON begins with ASCII: where the zero bytes are tells the encoding. The longer ones come first.
_WIDE = [
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"[^\0]\0\0\0", "UTF-32LE"),
    (rb"\0\0\0[^\0]", "UTF-32BE"),
    (rb"[^\0]\0", "UTF-16LE"),
    (rb"\0[^\0]", "UTF-16BE"),
]
_MORE_THAN_JSON = (
    "invalid character",
    "invalid utf-16 surrogate pair",
    "unexpected end of hex esca",
)
"""In what msgspec says of NaN, control characters and halves of surrogate pairs."""


_OF_MESSENGER = re.compile(rb"\[\d+([/:-]|\.\d+\.)")
"""The beginning of a time, which WhatsApp writes before each message."""
_NOT_SHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but for tabs and ends of lines, those that change the direction, and halves of
surrogate pairs, which are in no encoding."""


def printable(text: str) -> str:
    """Return a text with escapes in place of what a terminal would obey, or cannot show."""
    return _NOT_SHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


class DataError(UserError):
    """Chat data that cannot be used; names the file or the record."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NoChats(DataError):
    """A file that can be read, but holds no chats."""


def empty(name: str) -> DataError:
    """Return the error of a file without a byte, or with nothing but white space.

    As text it is one of no chats. Where it is a table, an archive or a packed file, which are never
    empty, it is what a copy has left.
    """
    is_text = not name.lower().endswith((*_NEVER_EMPTY, *PACKED))
    return (NoChats if is_text else DataError)(f"{name} is empty. {_CHATS}")


def unreadable(path: Path | str, error: Exception) -> DataError:
    """Return the error of a file that the system does not give, or whose compression is broken."""
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path} cannot be read: {error.strerror}. Check the path and its rights.")
    if isinstance(error, EOFError) or "runcated" in str(error):
        return DataError(f"{path} is cut off in its compressed data: copy or download it again.")
    return damaged(str(path), error)


def no_regular_file(path: Path) -> DataError:
    """Return the error of a path that is neither a file nor a folder."""
    return DataError(
        f"{path} is no regular file but a pipe, a socket or a device, and chats are read more than "
        "once: write them into a file, and name that."
    )


def no_end(name: str) -> DataError:
    """Return the error of a file that lacks the mark that its writer puts at the end."""
    return DataError(f"{name} is cut off: it has no mark of its end. Copy or download it again.")


def damaged(name: str, error: Exception) -> DataError:
    """Return the error of a file whose packing or form is broken."""
    return DataError(f"{name} is damaged ({error}): copy or download it again.")


def unpacked_name(name: str) -> str:
    """Return a file's name without what it is packed in."""
    return name.removesuffix(next((end for end in PACKED if name.endswith(end)), ""))


def check_pyarrow(name: str, kind: str) -> None:
    """Raise a DataError where a file of a kind that only pyarrow reads cannot be read."""
    if (said := lacking("parquet", f"{name} is {kind}, which")) is not None:
        raise DataError(said)


@contextmanager
def of_reading(name: Path | str) -> Iterator[None]:
    """Turn what may go wrong in reading a file into a `DataError`."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(name, error) from error


def of_web(path: str) -> DataError:
    """Return the error of a path that is an address of the web."""
    found = re.match(r"https?://huggingface\.co/datasets/([^/]+/[^/?#]+)", path)
    return DataError(
        f"{path} is a URL: download the file and name that, or read a data set of the Hugging Face "
        f"hub by 'dataset=hub dataset.path={found[1] if found else 'OWNER/NAME'}'."
    )


def no_chat_files(name: str, others: Sequence[str]) -> NoChats:
    """Return the error of a folder or an archive without a file that may hold chats."""
    held = f" It holds {_named(others)}." if others else ""
    if inner := [name for name in others if re.search(r"\.(zip|tgz|tar(\.\w+)?)$", name.lower())]:
        return NoChats(
            f"{name} holds no chats but {_named(inner)}: an archive within an archive is not "
            "opened. Unpack it, and name what it holds."
        )
    return NoChats(
        f"{name} holds no *.json, *.jsonl, *.ndjson, *.parquet, *.arrow, *.feather, *.csv or "
        f"*.tsv, plain or as {', '.join(PACKED)}, and no *.zip or *.tar of them, packed or "
        f"not.{held}"
    )


def say_passed_over(name: str, others: Sequence[str]) -> None:
    """Log which files of a folder or an archive are not read."""
    if others:
        log.warning("data: %s: %d files passed over: %s", name, len(others), _named(others))


def _named(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5])) + (" ..." if len(names) > 5 else "")


def foreign(name: str, head: bytes) -> DataError | None:
    """Return the error if a file's first bytes are not the beginning of any JSON in UTF-8."""
    if words := kind_by_beginning(head):
        return DataError(f"{name} {words}")
    for pattern, encoding in _WIDE:
        if re.match(pattern, head):
            return _wrong_encoding(name, encoding)
    return None


def not_json(name: str, text: bytes | memoryview, error: Exception) -> DataError:
    """Return the error of a JSON list or object that `msgspec` refused."""
    if isinstance(error, RecursionError):
        return DataError(f"{name} is nested too deeply. {_CHATS}")
    if _OF_MESSENGER.match(text[:40]):
        return DataError(f"{name} is not JSON but plain text, as of a messenger's export. {_CHATS}")
    message, _, place = str(error).removeprefix("JSON is malformed: ").partition(" (byte ")
    position = int(place.rstrip(")")) if place else len(text)
    if position >= len(text):
        line, column = _place(text, len(text))
        return DataError(
            f"{name} is cut off: the JSON value that it begins with has no end before the file's, "
            f"at line {line}, column {column}. Copy or download it again."
        )
    if message.startswith("trailing comma"):
        position = _comma_before(text, position)
    if message == "trailing characters":
        position -= 1  # msgspec names the byte after the first of them
        message += " after the end of the first value (for one value a line, use `jq -c .`)"
    advice = ""
    if message.startswith(_MORE_THAN_JSON):
        advice = " As JSON Lines, a chat a line, characters that Python's json writes are taken."
    line, column = _place(text, position)
    return DataError(f"{name} is not valid JSON: {message}: line {line}, column {column}.{advice}")


def no_json_line(name: str, line: int, text: bytes) -> DataError:
    """Return the error of a file in which no line is JSON; `line` and `text` are its first."""
    try:
        json.loads(text.decode("utf-8", "replace"))
        why, column = "?", 1
    except (ValueError, RecursionError) as error:
        why, column = getattr(error, "msg", str(error)), getattr(error, "colno", 1)
    return DataError(
        f"{name} is not valid JSON: no line of it is. Line {line}, column {column}: {why}. {_CHATS}"
    )


def single_value(name: str, value: Any) -> NoChats:
    """Return the error of a file of JSON values, as this one, that are no objects."""
    kinds = {str: "text", list: "list", bool: "boolean", type(None): "null"}
    kind = kinds.get(type(value), "number")
    return NoChats(
        f"{name} holds no chats: it has a JSON {kind} where an object should be. {_CHATS}"
    )


def is_text_table(name: str) -> bool:
    """Tell CSV and TSV, packed or not, by the name."""
    return unpacked_name(name.lower()).endswith((".csv", ".tsv"))


def wrong_bytes(name: str, text: bytes) -> DataError:
    """Return the error of a text that is not UTF-8."""
    return _wrong_encoding(name, _single_byte_encoding(text))


def wrong_encoding(name: str, records: Iterable[bytes]) -> DataError | None:
    """Return the error if none of the records that are more than ASCII is UTF-8.

    But a few broken ones among others are no encoding: they are dropped, and counted.
    """
    sample = b""
    total = broken = 0
    for record in records:
        total += 1
        if record.isascii():
            continue
        try:
            record.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            broken += 1
            sample = sample[:100_000] + record
        else:
            return None
    if b"\0" in sample:
        return DataError(f"{name} is neither text nor a known binary format. {_CHATS}")
    if broken < 3 and total >= 10 * broken:
        return None
    return _wrong_encoding(name, _single_byte_encoding(sample))


def _single_byte_encoding(sample: bytes) -> str:
    """Return the likelier of two: only cp1252 has letters and quotes from 0x80 to 0x9f."""
    try:
        sample.decode("cp1252")
    except UnicodeDecodeError:
        return "ISO-8859-1"
    return "CP1252" if re.search(rb"[\x80-\x9f]", sample) else "ISO-8859-1"


def _wrong_encoding(name: str, encoding: str) -> DataError:
    return DataError(
        f"{name} is not UTF-8 but probably {encoding}: "
        f"convert it with `iconv -f {encoding} -t UTF-8 {shlex.quote(name)} > {_mended(name)}`"
        f"{_unpacked(name)}."
    )


def _mended(name: str) -> str:
    """Name a file for a shell to write: never the one that it reads, which it would empty first."""
    return shlex.quote("mended-" + unpacked_name(Path(name).name))


def _unpacked(name: str) -> str:
    return " once it is unpacked" if name.endswith(PACKED) or "!" in name else ""


def _comma_before(text: bytes | memoryview, position: int) -> int:
    while bytes(text[position : position + 1]) != b",":
        position -= 1
    return position


def _place(text: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return line and column, from 1, without a copy of the text."""
    line, start = 1, 0
    for newline in re.finditer(rb"\n", text[:position]):
        line, start = line + 1, newline.end()
    return line, position - start + 1
