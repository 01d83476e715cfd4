"""All conversations of some chat files: which are taken, and counts of what was left out and why.

A raw chat that cannot be used, or that the options leave out, is counted under a named reason; a
file that cannot be read is a `DataError`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_exp.data import faults
from medusa_exp.data.chat_files import ChatFile, HubData, find_files
from medusa_exp.data.faults import DataError
from medusa_exp.data.parsing import (
    NO_LIST,
    NOT_JSON,
    NOT_OBJECT,
    NOT_UTF8,
    ROLES,
    ChatParser,
    Conversation,
    Message,
    RawChat,
    content_digest,
    decode_leniently,
    raw_bytes,
)

__all__ = [
    "Conversation",
    "DataError",
    "Message",
    "ReadOptions",
    "Reading",
    "content_digest",
    "read_conversations",
]

_HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which conversations are taken, and how roles are named: as the config's dataset has it."""

    hub_split: str = "train"
    role_map: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    deduplicate: bool = False
    min_turns: int = 1
    max_turns: int | None = None
    min_chars: int = 0
    max_chars: int | None = None
    sample_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, role in self.role_map.items():
            if role not in ROLES:
                raise DataError(f"dataset.role_map: {name}={role}: use one of {', '.join(ROLES)}.")
        for what in ("turns", "chars"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if not (isinstance(least, int) and least >= 0):
                raise DataError(f"dataset.min_{what}={least} must be a whole number from 0.")
            if most is not None and not (isinstance(most, int) and most >= least):
                raise DataError(
                    f"dataset.max_{what}={most} must be null or a whole number from min_{what}="
                    f"{least}."
                )
        share = self.sample_fraction
        if not (isinstance(share, int | float) and 0 <= share <= 1):
            raise DataError(f"dataset.sample_fraction={share} must be a number from 0 to 1.")

    def reason_against(self, conversation: Conversation) -> str | None:
        """Return why a conversation is left out, or None. Copies are not looked for here."""
        if self.sample_fraction < 1 and not self._is_sampled(conversation.id):
            return "not sampled"
        messages = conversation.messages
        if self.min_turns > 1 or self.max_turns is not None:  # none has fewer than one
            turns = sum(message.role != "system" for message in messages)
            if turns < self.min_turns:
                return "too few turns"
            if self.max_turns is not None and turns > self.max_turns:
                return "too many turns"
        if self.min_chars or self.max_chars is not None:
            chars = sum(len(message.content) for message in messages)
            if chars < self.min_chars:
                return "too short"
            if self.max_chars is not None and chars > self.max_chars:
                return "too long"
        return None

    def _is_sampled(self, conversation_id: str) -> bool:
        # Not the hash of the id alone: that one splits the data set, see data/sources.py.
        digest = hashlib.sha256(f"sample {self.seed} {conversation_id}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.sample_fraction * 2**64


class Reading:
    """An iterable over the conversations of some sources; iterating again reads again.

    `dropped` (reason -> chats) and `num_records` describe the newest iteration.
    """

    def __init__(self, sources: Sequence[ChatFile | HubData], options: ReadOptions) -> None:
        self.options = options
        self.paths = [source.path for source in sources if isinstance(source, ChatFile)]
        self.dropped: Counter[str] = Counter()
        self.num_records = 0
        self._sources = sources

    def fingerprints(self) -> list[str]:
        """Name the content of what is not in files: see `paths` for those."""
        return [source.fingerprint() for source in self._sources if isinstance(source, HubData)]

    def __iter__(self) -> Iterator[Conversation]:
        self.dropped.clear()
        self.num_records = 0
        seen: set[bytes] = set()
        for source in self._sources:
            for conversation in self._usable(source):
                reason = self.options.reason_against(conversation)
                if reason is None and self.options.deduplicate:
                    digest = content_digest(conversation)
                    reason = "duplicate" if digest in seen else None
                    seen.add(digest)
                if reason is None:
                    yield conversation
                else:
                    self.dropped[reason] += 1

    def _usable(self, source: ChatFile | HubData) -> Iterator[Conversation]:
        """Yield what can be made of a source's raw chats, and count the rest."""
        parse = ChatParser(self.options.role_map).parse
        faulty = _FaultyChats(source)
        number = 0
        for number, raw in enumerate(source, 1):
            self.num_records += 1
            found = parse(raw)
            if not isinstance(found, str):
                yield found
                continue
            faulty.add(raw, found)
            if self.options.strict:
                line = f" (line {source.line})" if source.line else ""
                raise DataError(f"{source.name}, record {number}{line}: {found}.")
            self.dropped[found] += 1
        faulty.check(number)


@dataclass
class _FaultyChats:
    """Decides from a source's unusable chats whether the source as a whole is to blame."""

    source: ChatFile | HubData
    reasons: Counter[str] = field(default_factory=Counter)
    first: RawChat = b""
    first_line: int = 0

    def add(self, raw: RawChat, reason: str) -> None:
        """Take note of an unusable chat.

        Raises:
            DataError: it shows that the file is not in UTF-8.
        """
        if not self.reasons:
            self.first, self.first_line = raw, self.source.line
        self.reasons[reason] += 1
        is_first = self.reasons[reason] == 1
        if reason == NOT_UTF8 and is_first and isinstance(self.source, ChatFile):
            again = ChatFile(self.source.path)
            if error := faults.wrong_encoding(again.name, map(raw_bytes, again)):
                raise error

    def check(self, num_records: int) -> None:
        """Look at the whole, once it has been read.

        Raises:
            DataError: no line is JSON, or the file is a single value that is no chat.
        """
        if not (self.first_line and sum(self.reasons.values()) == num_records):
            return
        text = raw_bytes(self.first)
        if self.reasons[NOT_JSON] == num_records:
            raise faults.no_json_line(self.source.name, self.first_line, text)
        if num_records == 1 and self.reasons.keys() & {NO_LIST, NOT_OBJECT}:
            raise faults.single_value(self.source.name, decode_leniently(text))


def read_conversations(paths: str | Path | Sequence[str | Path], **options: Any) -> Reading:
    """Open chat files for reading.

    Args:
        paths: a file, a folder (all of its *.json, *.jsonl, *.ndjson and *.parquet, at any depth,
            also as *.gz and *.zst), a glob, or hub:<owner>/<name>; or several of these.
        options: as the fields of `ReadOptions`.

    Raises:
        DataError: there is no such file, or an option has no such value. Faults inside a file are
            raised when it is iterated.
    """
    chosen = ReadOptions(**options)
    sources: list[ChatFile | HubData] = []
    for place in [paths] if isinstance(paths, str | Path) else paths:
        if str(place).startswith(_HUB):
            sources.append(HubData(str(place).removeprefix(_HUB), chosen.hub_split))
        else:
            sources += map(ChatFile, find_files(place))
    once = {source.name: source for source in sources}  # a file named twice is read once
    return Reading(list(once.values()), chosen)
