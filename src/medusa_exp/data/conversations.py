"""ShareGPT files in, `Conversation`s out.

A file is a JSON list of records or JSON Lines, told apart by content. A record that cannot be used
is dropped and counted under a named reason; a file that cannot be read is a `DataError`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import msgspec

from medusa_exp.errors import UserError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class DataError(UserError):
    """Chat data that cannot be used; names the file or the record."""


class Message(msgspec.Struct, frozen=True):
    """One turn; role is system, user or assistant."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """A chat with an id that stays the same from run to run."""

    id: str
    messages: list[Message]


def content_digest(conversation: Conversation) -> bytes:
    """Return 16 bytes that name the roles and words of a conversation, whatever its id."""
    digest = hashlib.blake2b(digest_size=16)
    for message in conversation.messages:
        digest.update(f"{message.role}\0{message.content}\0".encode("utf-8", "surrogatepass"))
    return digest.digest()


class _Turn(msgspec.Struct):
    source: str = msgspec.field(name="from")
    value: str


class _Record(msgspec.Struct):
    conversations: list[_Turn]
    id: str | int | None = None


@dataclass
class Reading:
    """An iterable over the conversations of some files; iterating again reads again.

    `dropped` (reason -> records) and `num_records` describe the newest iteration.
    """

    paths: list[Path]

    def __post_init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.num_records = 0

    def __iter__(self) -> Iterator[Conversation]:
        self.dropped.clear()
        self.num_records = 0
        for path in self.paths:
            for raw in _raw_records(path):
                self.num_records += 1
                conversation = self._parse(raw)
                if conversation is not None:
                    yield conversation

    def _parse(self, raw: msgspec.Raw) -> Conversation | None:
        try:
            record = _record_decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.dropped["not a ShareGPT record"] += 1
            return None
        messages = [
            Message(_ROLES.get(turn.source, ""), turn.value) for turn in record.conversations
        ]
        reason = _unusable(messages)
        if reason:
            self.dropped[reason] += 1
            return None
        content_id = "sha256-" + hashlib.sha256(raw).hexdigest()[:16]
        return Conversation(content_id if record.id is None else str(record.id), messages)


def read_conversations(paths: str | Path | Sequence[str | Path], **options: Any) -> Reading:
    """Open chat files for reading.

    Args:
        paths: a file, a folder (its *.json and *.jsonl, at any depth) or a glob; or several.

    Raises:
        DataError: there is no such file. Faults inside a file are raised when it is iterated.
    """
    several = [paths] if isinstance(paths, str | Path) else paths
    return Reading([file for path in several for file in _expand(path)])


def _expand(path: str | Path) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix in {".json", ".jsonl"})
        if not found:
            raise DataError(f"{place} holds no *.json or *.jsonl file.")
        return found
    # Path.glob would need the pattern cut from its root.
    matches = glob(str(place), recursive=True)  # noqa: PTH207
    found = sorted(Path(match) for match in matches if Path(match).is_file())
    if not found:
        raise DataError(f"{place}: there is no such file, folder or match. Check dataset.path.")
    return found


_record_decoder = msgspec.json.Decoder(_Record)
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_lines_decoder = msgspec.json.Decoder(msgspec.Raw)


def _raw_records(path: Path) -> list[msgspec.Raw]:
    """Return the undecoded records of a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise DataError(f"{path} is empty: a ShareGPT file is a JSON list of conversations.")
    try:
        if text.startswith(b"["):
            return _list_decoder.decode(text)
        records = _lines_decoder.decode_lines(text)
    except msgspec.DecodeError as error:
        raise DataError(f"{path} is not valid JSON: {_located(error, text)}.") from error
    if len(records) == 1 and not _is_record(records[0]):
        raise DataError(f"{path} holds one JSON value; a ShareGPT file is a list of conversations.")
    return records


def _is_record(raw: msgspec.Raw) -> bool:
    value: Any = msgspec.json.decode(raw)
    return isinstance(value, dict) and "conversations" in value


def _located(error: msgspec.DecodeError, text: bytes) -> str:
    """Add line and column to msgspec's message, which names the byte."""
    message = str(error)
    position = message.rpartition("byte ")[2].rstrip(")")
    if not position.isdigit():
        return message
    before = text[: int(position)]
    line = before.count(b"\n") + 1
    column = len(before) - before.rfind(b"\n")
    return f"{message} = line {line}, column {column}"


def _unusable(messages: list[Message]) -> str | None:
    """Return why a conversation cannot be trained on, or None."""
    if not messages:
        return "no turns"
    if any(not message.role for message in messages):
        return "unknown role"
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        return "no assistant turn"
    return None
