"""What is wrong with a chat file that cannot be read, and what to do: messages of `DataError`."""

import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from medusa_exp.data.other_kinds import TELEGRAM, kind_by_beginning, kind_by_keys
from medusa_exp.data.turn_lists import names_a_turn
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


class DataError(UserError):
    """Chat data that cannot be used; names the file or the record."""


class NoChats(DataError):
    """A file that can be read, but holds no chats."""


def empty(name: str) -> DataError:
    """Return the error of a file without a byte, or with nothing but white space.

    As text it is one of no chats. A table or an archive without a byte is what a copy has left.
    """
    is_text = not unpacked_name(name.lower()).endswith(_NEVER_EMPTY)
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
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


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


A_ROW = "a list of fields without their names"
AS_RECORDS = (
    "Save records, which name their fields: of a pandas table, to_json(orient='records') does."
)

_REMEDY = (
    "If they are chats, say what their texts stand under, as in "
    "'dataset.columns={user: KEY, assistant: KEY, system: KEY}' or 'dataset.columns={messages: "
    "KEY}', or what dataset.form they have."
)


def no_records(name: str) -> NoChats:
    """Return the error of a list, or a table, of nothing."""
    return NoChats(
        f"{name} holds no record: it is an empty list, or a table without a row. Write the chats "
        "into it, or name another file."
    )


def no_form(
    name: str,
    keys: Sequence[str],
    what: str = "keys",
    columns: str = "",
    named: Iterable[str] = (),
    seen: str = "",
) -> NoChats:
    """Return the error of a file none of whose records has a form that is known.

    `columns` is what dataset.columns would read the first of them by, `named` the paths that it
    names, and `seen` a sentence of what was seen in that record.
    """
    if not columns and (words := kind_by_keys(keys)):
        return NoChats(f"{name} {words}")
    absent = [path for path in named if not {path, path.partition(".")[0]} & {*keys}]
    shown = ", ".join(map(str, keys[:30])) + (" ..." if len(keys) > 30 else "")
    shown = shown.encode("utf-8", "replace").decode()  # a key may hold half a surrogate pair
    seen = seen.encode("utf-8", "replace").decode()
    one = ""
    if absent:
        one = f" {absent_columns(absent, keys)}"
    elif {"role", "text", "parent_id"} <= set(keys):
        one = (
            " Each record seems to be one message of a tree: take the file of trees "
            "(*.trees.jsonl.gz of OpenAssistant's), whose records hold the `replies`."
        )
    elif {"role", "content"} <= set(keys) or {"role", "text"} <= set(keys):
        one = (
            " Each record seems to be one message: gather those of a chat in a list, as "
            '{"messages": [{"role": ..., "content": ...}, ...]}.'
        )
    elif seen:
        one = f" {seen}"
    elif is_text_table(name):
        one = _about_header(keys)
    remedy = "" if absent or (seen and seen in one) else f" {_REMEDY}"
    remedy = f" If they are chats, say 'dataset.columns={columns}'." if columns else remedy
    return NoChats(
        f"{name} has no known form of chat: its {what} are {shown or 'none'}.{one}{remedy}"
    )


def absent_columns(absent: Sequence[str], keys: Sequence[str]) -> DataError:
    """Return the error of paths that are in no record; `keys` are those of one."""
    return DataError(f"dataset.columns names what is not there: {_with_likely(absent, keys)}.")


def _with_likely(absent: Sequence[str], keys: Sequence[str]) -> str:
    """Name paths that a record lacks, each with the key that may be meant, if there is one near."""
    small = {str(key).lower(): str(key) for key in keys}
    found = []
    for path in absent:
        first, dot, rest = path.partition(".")
        near = get_close_matches(first.lower(), small, 1)
        found.append(f"{path} (did you mean {small[near[0]]}{dot}{rest}?)" if near else path)
    return ", ".join(found)


_RENDERED = re.compile(
    r"<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>|\bUSER:(?=[\s\S]*?\bASSISTANT:)"
)
_AS_MESSAGES = 'as {"messages": [{"role": "user", "content": ...}, ...]}'


def seen_in(record: Mapping[str, Any], columns: str = "") -> str:
    """Return what is to be said of a record of no known form, instead of the remedy for all.

    `columns` would read it, though perhaps not the best of it.
    """
    if columns:
        if record.get("annotations") and "annotations" not in columns:
            return (
                "Its annotations are not read: if they correct what is, write them in its place "
                "first."
            )
        return ""
    for key, value in record.items():
        if isinstance(value, str) and (mark := _RENDERED.search(value[:10_000])):
            return (
                f"What stands under {key} is a chat as a template has written it (with {mark[0]}), "
                f"which is not read: split it into messages, {_AS_MESSAGES}."
            )
    message = record.get("message")
    if isinstance(message, dict) and {"role", "content"} <= message.keys():
        return (
            "Each record seems to hold one message, under message: gather those of a chat in a "
            f"list, {_AS_MESSAGES}."
        )
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if names_a_turn(value[0]):
                return (
                    f"Under {key} stand turns: if what follows them stands beside them, say "
                    f"'dataset.columns={{user: {key}, assistant: KEY}}'."
                )
            names = ", ".join(map(str, [*value[0]][:30]))
            return (
                f"Under {key} stands a list of objects, whose keys are {names}. If they are turns, "
                f"write them with keys that are known, {_AS_MESSAGES}; of answers, {key}.0.KEY "
                f"names that of the first. {_REMEDY}"
            )
    return ""


def no_answer(name: str, columns: str) -> NoChats:
    """Return the error of a file whose answers stand apart from its messages."""
    return NoChats(
        f"{name} has no chat that can be read: none of its records has an assistant turn among its "
        f"messages. The answers seem to stand beside them: say 'dataset.columns={columns}'."
    )


def no_answers_yet(name: str) -> NoChats:
    """Return the error of the requests of a batch, without its answers."""
    return NoChats(
        f"{name} has no chat that can be read: they are the requests of a batch, whose answers are "
        "in its output file. Write those behind the messages of the requests of the same custom_id."
    )


def no_words(name: str, detail: str) -> NoChats:
    """Return the error of Telegram's chats, each of which has a message of other than text."""
    return NoChats(
        f"{name} has no chat that can be read: each has a picture or the like ({detail}). It seems "
        f"to be Telegram's export: {TELEGRAM}."
    )


def is_text_table(name: str) -> bool:
    """Tell CSV and TSV, packed or not, by the name."""
    return unpacked_name(name.lower()).endswith((".csv", ".tsv"))


def _about_header(columns: Sequence[str]) -> str:
    said = ""
    if any(" " in column.strip() or column.isdigit() for column in columns):
        said = " They are its first line: write one above it, as prompt,completion, if it has none."
    if len(columns) == 1:
        said += (
            " If they are several columns, say what stands between them in a line above, as sep=^ "
            "does: comma, semicolon, tab and | are known."
        )
    elif odd := [column for column in columns if column != column.strip()]:
        said += f" Take the space out of {odd[0]!r}."
    return said


_NOT_JSON_LISTS = (
    # NumPy writes no comma between what stands on lines of their own.
    ("NumPy", re.compile(r"\s*\[?array\(|\s*\[\s*(\{\s*'|')[^\n]*[}']\s*\n\s*[{']")),
    ("Python", re.compile(r"\s*\[\s*(\{\s*)?'")),
)


def not_json_list(name: str, key: str, text: Any) -> NoChats | None:
    """Return the error if a text is a list as Python or NumPy print it, which is no JSON."""
    if not isinstance(text, str):
        return None
    writer = next((who for who, begin in _NOT_JSON_LISTS if begin.match(text)), None)
    if writer is None:
        return None
    column = f"df[{key!r}]"
    remedy = (
        f"Write it as JSON where the file is made, as by `{column} = {column}.map(lambda turns: "
        "json.dumps(list(turns)))`"
    )
    if writer == "Python":
        remedy += f"; from this file, by `{column}.map(ast.literal_eval).map(json.dumps)`"
    return NoChats(
        f"{name}: what stands under {key} is a list as {writer} prints it, not JSON ({text!r:.50} "
        f"...). {remedy}."
    )


def same_columns(name: str, column: str) -> DataError:
    """Return the error of a table in which one name is that of two columns."""
    return DataError(f"{name}: two of its columns are called {column}: rename or drop one of them.")


def no_usable_turn(name: str, reason: str, detail: str) -> NoChats:
    """Return the error of a file all of whose records fail for want of turns that are known."""
    remedy = (
        "Say whose a role is, as in 'dataset.role_map={narrator: system}', or what the texts stand "
        "under, as in 'dataset.columns={user: KEY, assistant: KEY}'."
    )
    if reason != "unknown role":
        remedy = (
            "Neither dataset.role_map nor dataset.columns reads such turns: write them with keys "
            f"that are known, {_AS_MESSAGES}. Texts beside them are read by "
            "'dataset.columns={user: KEY, assistant: KEY}'."
        )
    if detail.startswith("the role is {"):
        remedy = (
            "Who speaks is an object: write one name in its place, as by `jq '.messages[].author "
            "|= .name'`, and say whose it is, as in 'dataset.role_map={ann: assistant, bob: user}'."
        )
    remedy = AS_RECORDS if reason == A_ROW else remedy
    return NoChats(f"{name} has no chat that can be read: {reason}: {detail}. {remedy}")


def ambiguous(place: str, what: str, remedy: str) -> DataError:
    """Return the error of a record that can be read in several ways."""
    others = (
        "Keep one of them, or say what is to be read, as in 'dataset.columns={messages: KEY, "
        "system: KEY}' or 'dataset.columns={user: KEY, assistant: KEY, system: KEY}'."
    )
    return DataError(f"{place} {what}. {remedy or others}")


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
