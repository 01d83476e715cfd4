"""All conversations of some chat files: which are taken, and counts of what was left out and why.

A raw chat that cannot be used, or that the options leave out, is counted under a named reason; a
file that cannot be read is a `DataError`.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from medusa_exp.data import faults, record_faults
from medusa_exp.data.chat_files import ChatFile, HubData, Part, find_files
from medusa_exp.data.faults import DataError, NoChats
from medusa_exp.data.forms import FORMS, columns_of, forms_of
from medusa_exp.data.messages import NO_REPLY, Conversation
from medusa_exp.data.pairs import REPLIES
from medusa_exp.data.parsing import (
    NO_FORM,
    NOT_A_TURN,
    NOT_JSON,
    NOT_OBJECT,
    NOT_UTF8,
    UNKNOWN_ROLE,
    ChatParser,
    value_of,
)
from medusa_exp.data.raw_chats import RawChat, raw_bytes
from medusa_exp.data.record_faults import A_ROW
from medusa_exp.data.records import SYSTEMS, Ambiguous
from medusa_exp.data.remedies import columns_for, roles_for, settings_for
from medusa_exp.data.tables import records_within
from medusa_exp.data.turn_lists import WRAPPERS, names_a_turn
from medusa_exp.data.turns import (
    CALLS,
    ENTITIES,
    PICTURE,
    PICTURES,
    REASONING,
    ROLES,
    SWITCHES,
    TOOLS,
    Unusable,
    is_held,
)
from medusa_exp.runs.progress import Patience

log = logging.getLogger(__name__)

T = TypeVar("T")
HUB = "hub:"
_LOOKED_AT = 100
_SAMPLES = 10
"""So many chats that were refused for one reason are tried with other columns."""
_MOST_TURNS = 10_000
"""So many messages may be those of one chat."""
_MATTERING = {
    *(*REASONING, *CALLS, *SWITCHES, "mask"),
    *(*SYSTEMS, *TOOLS, *PICTURES, *REPLIES, "choices"),
}
"""Keys that change what a template writes, or what is trained."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which conversations are taken, and how roles are named: as the config's dataset has it."""

    hub_split: str = "train"
    form: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    role_map: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    deduplicate: bool = False
    min_turns: int = 1
    max_turns: int | None = None
    min_chars: int = 0
    max_chars: int | None = None
    max_record_bytes: int = 1 << 23
    sample_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # The config has checked single values; an unknown form given from Python would be a
        # KeyError.
        if self.form not in ("auto", *FORMS):
            raise DataError(f"dataset.form={self.form}: use auto, {', '.join(FORMS)}.")
        for name, role in self.role_map.items():
            if role not in ROLES:
                raise DataError(f"dataset.role_map: {name}={role}: use one of {', '.join(ROLES)}.")
        known = ("user", "assistant", "system", "messages", "reasoning")
        for name in self.columns:
            if name not in known:
                raise DataError(f"dataset.columns: {name}: use {', '.join(known)}.")
        if not self.columns:
            return
        if self.form != "auto":
            raise DataError("dataset.form and dataset.columns are both set: use one of them.")
        if {"messages", "user"} <= {*self.columns}:
            raise DataError("dataset.columns: messages holds the user's texts too: leave out user.")
        if ("assistant" in self.columns) == ("messages" in self.columns):
            raise DataError(
                "dataset.columns needs the key of the assistant's texts, as in '{user: question, "
                "assistant: answer}', or that of lists of messages, as in '{messages: dialog}'."
            )

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
            chars = sum(len(message.content) + len(message.reasoning) for message in messages)
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

    `dropped` (reason -> chats), `examples` (reason -> the first such chat), `forms` (name of a form
    -> chats that have it), `unused` (key that is not read -> chats, of the `num_looked_at` that
    were looked at) and `num_records` describe the newest iteration.
    """

    def __init__(self, sources: Sequence[ChatFile | HubData], options: ReadOptions) -> None:
        self.options = options
        self.paths = [source.path for source in sources if isinstance(source, ChatFile)]
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.forms: Counter[str] = Counter()
        self.num_records = 0
        self.unused: Counter[str] = Counter()
        self.num_looked_at = 0
        self.look_at = _LOOKED_AT
        """Of each file, so many are looked at for keys that are not read."""
        self.absent: set[str] = set()
        """Paths of `options.columns` that a record may lack, and that none has had."""
        self.keys: tuple[str, ...] = ()
        """Of a record, where there are such paths."""
        self._sources = sources
        self._columns = columns_of(forms_of(options.form, options.columns))
        self._said: set[str] = set()

    def fingerprints(self) -> list[str]:
        """Name the content of what is not in files: see `paths` for those."""
        return [source.fingerprint() for source in self._sources if isinstance(source, HubData)]

    def __iter__(self) -> Iterator[Conversation]:
        self.dropped.clear()
        self.examples.clear()
        self.forms.clear()
        self.unused.clear()
        self.num_records = self.num_looked_at = 0
        self.absent = {*self.options.columns.values()}
        seen: set[bytes] = set()
        for conversation in self._all():
            reason = self.options.reason_against(conversation)
            if reason is None and self.options.deduplicate:
                digest = conversation.digest()
                reason = "duplicate" if digest in seen else None
                seen.add(digest)
            if reason is None:
                yield conversation
            else:
                self.dropped[reason] += 1
        self._say_unused()

    def told(self) -> str:
        """Say in a sentence what the newest iteration has dropped, and why."""
        reasons = "; ".join(
            f"{reason}: {number}"
            + (f" (as {self.examples[reason]})" if reason in self.examples else "")
            for reason, number in self.dropped.items()
        )
        return f"Dropped of {self.num_records} records: {reasons or 'none'}."

    def _say_unused(self) -> None:
        """Log, once, what is not read; as a warning, where it may change what is trained."""
        if not self.unused or "unused" in self._said:
            return
        self._said.add("unused")
        named = ", ".join(f"{key} ({number})" for key, number in self.unused.most_common(20))
        matters = any(key.rpartition(".")[2] in _MATTERING for key in self.unused)
        log.log(
            logging.WARNING if matters else logging.INFO,
            "data: keys that are not used, in %d records of %s looked at: %s",
            self.num_looked_at,
            self._sources[0].name + (" ..." if len(self._sources) > 1 else ""),
            named,
        )

    def _all(self) -> Iterator[Conversation]:
        """Yield the chats of all files that have any.

        Raises:
            NoChats: none has, or one that was named by itself.
        """
        passed_over: dict[str, NoChats] = {}
        have_chats = False
        for source in self._sources:
            try:
                limit, paths = self.options.max_record_bytes, self.options.columns
                parts: Iterator[Part | HubData] = iter(source.parts(self._columns, limit, paths))
                for part in self._watched(source, parts):
                    try:
                        yield from self._usable(part)
                        have_chats = True
                    except NoChats as error:
                        if part.is_named:
                            raise
                        passed_over[part.name] = error
            except NoChats as error:
                if source.is_named:
                    raise
                passed_over[source.name] = error
        if passed_over and not have_chats:
            raise next(iter(passed_over.values()))
        for name, reason in passed_over.items():
            if name not in self._said:
                log.warning("data: passed over, for it holds no chats: %s", reason)
        self._said.update(passed_over)

    def _usable(self, source: Part | HubData) -> Iterator[Conversation]:
        """Yield what can be made of a source's raw chats, and count the rest."""
        options = self.options
        parser = ChatParser(
            options.role_map,
            options.form,
            options.columns,
            source.name,
            self.look_at,
            options.max_record_bytes,
        )
        parse = parser.parse
        faulty = _FaultyChats(source, options)
        number = 0
        try:
            for number, raw in enumerate(self._watched(source, source), 1):
                self.num_records += 1
                found = parse(raw, number)
                if not isinstance(found, str):
                    yield found
                    continue
                place = _place(source, number)
                faulty.add(raw, found, parser.detail)
                detail = f": {parser.detail}" if parser.detail else ""
                if options.strict:
                    raise DataError(f"{place}: {found}{detail}.")
                self.dropped[found] += 1
                self.examples.setdefault(found, f"{place}{detail}")
            faulty.check(number)
        except Ambiguous as ways:
            error = record_faults.ambiguous(_place(source, number), str(ways), ways.remedy)
            raise _without_form(options.form, error) from ways
        except NoChats as error:
            raise _without_form(options.form, error) from error
        finally:
            self._count_forms(parser, number - faulty.reasons.total())
            self.absent &= parser.absent
            self.keys = source.keys or parser.keys
            for column in sorted({*source.keys} - {*self._columns, *parser.unused}):
                self.unused[column] += parser.num_looked_at

    def _watched(self, source: ChatFile | Part | HubData, items: Iterable[T]) -> Iterator[T]:
        """Yield what is read of a source, and say where one is that takes long to come."""

        def place() -> str:
            number = 0 if isinstance(source, ChatFile) else source.line
            line = f", at line {number:,}" if number else ""
            return f"reading {source.name}: {self.num_records:,} records so far{line}"

        with Patience(place) as patience:
            yield from patience.each(items)

    def _count_forms(self, parser: ChatParser, number: int) -> None:
        """Count the forms of so many chats, most of which have the first, and their unused keys."""
        self.unused.update(parser.unused)
        self.num_looked_at += parser.num_looked_at
        self.forms.update(parser.found)
        if (direct := number - parser.found.total()) > 0:
            self.forms["messages"] += direct


def _without_form(form: str, error: DataError) -> DataError:
    """Return the error; where it advises dataset.columns, add that dataset.form must go."""
    if form == "auto" or "dataset.columns=" not in str(error):
        return error
    return type(error)(f"{error} Leave out dataset.form={form} then.")


def _place(source: Part | HubData, number: int) -> str:
    line = f" (line {source.line})" if source.line else ""
    return f"{source.name}, record {number}{line}"


def _is_request(record: Any) -> bool:
    """Is it of the file that asks for a batch of answers?"""
    is_of_batch = isinstance(record, dict) and "custom_id" in record
    return is_of_batch and bool(record.keys() & {*WRAPPERS}) and not is_held(record.get("response"))


@dataclass
class _FaultyChats:
    """Decides from a source's unusable chats whether the source as a whole is to blame."""

    source: Part | HubData
    options: ReadOptions
    reasons: Counter[str] = field(default_factory=Counter)
    shown: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of each reason, the line of the first chat, and what shows it there."""
    samples: defaultdict[str, list[RawChat]] = field(default_factory=lambda: defaultdict(list))
    """Of each reason, the first chats, by which a remedy is looked for."""

    def add(self, raw: RawChat, reason: str, detail: str) -> None:
        """Take note of an unusable chat.

        Raises:
            DataError: it shows that the file is not in UTF-8.
        """
        self.reasons[reason] += 1
        self.shown.setdefault(reason, (self.source.line, detail))
        if len(samples := self.samples[reason]) < _SAMPLES:
            samples.append(raw)
        if reason == NOT_UTF8 and self.reasons[reason] == 1 and isinstance(self.source, Part):
            again = replace(self.source)
            if error := faults.wrong_encoding(again.name, map(raw_bytes, again)):
                raise error

    def check(self, num_records: int) -> None:
        """Look at the whole, once it has been read.

        Raises:
            DataError: no line is JSON.
            NoChats: there is no record, or none of them is a chat.
        """
        name = self.source.name
        if not num_records:
            raise record_faults.no_records(name)
        if self.reasons.total() < num_records:
            return
        [(reason, _)] = self.reasons.most_common(1)
        (line, detail), samples = self.shown[reason], self.samples[reason]
        first = samples[0]
        if line and self.reasons[NOT_JSON] == num_records:
            raise faults.no_json_line(name, line, raw_bytes(first))
        if self.reasons[NOT_JSON] or self.reasons[NOT_UTF8]:
            return
        if reason == NO_FORM:
            raise self._no_form(first, num_records)
        if reason == PICTURE and ENTITIES in str(value_of(first)):
            raise record_faults.no_words(name, detail)
        if reason == NO_REPLY and (columns := self._remedy(reason, columns_for)):
            raise record_faults.no_answer(name, columns)
        if reason == NO_REPLY and _is_request(value_of(first)):
            raise record_faults.no_answers_yet(name)
        if reason == NOT_OBJECT:
            raise faults.single_value(name, value_of(first))
        if reason in (UNKNOWN_ROLE, NOT_A_TURN, A_ROW):
            options = self.options
            roles = roles_for(samples, options.role_map, options.form, options.columns)
            raise record_faults.no_usable_turn(name, reason, detail, roles)

    def _no_form(self, first: RawChat, num_records: int) -> DataError:
        """Return the error of a source without a record of a known form, and what would read it."""
        name, is_table, record = self.source.name, bool(self.source.keys), value_of(first)
        keys = self.source.keys or tuple(record)
        for key in self.source.columns:
            if error := record_faults.not_json_list(name, key, record.get(key)):
                return error
        settings = self._remedy(NO_FORM, settings_for)
        if not settings and names_a_turn(record) and num_records <= _MOST_TURNS:
            settings = self._remedy_of_whole()
        if not settings and num_records == 1 and not is_table:
            for inner in records_within(name, first)[:1]:
                if settings := settings_for(inner, self.options.role_map):
                    record = value_of(inner)
                    keys = tuple(record)
        seen = record_faults.seen_in(record, settings)
        what = "columns" if is_table else "keys"
        named = self.options.columns.values()
        return record_faults.no_form(name, keys, what, settings, named, seen)

    def _remedy(self, reason: str, remedy_for: Callable[..., str]) -> str:
        """Return what would read the first chat that was refused so, or one near."""
        found = (remedy_for(raw, self.options.role_map) for raw in self.samples[reason])
        return next(filter(None, found), "")

    def _remedy_of_whole(self) -> str:
        """Return what reads a file as one record, whose turns were taken for records."""
        if not isinstance(self.source, Part) or self.source.keys:
            return ""
        whole = self.source.content.whole()
        if len(whole) > self.source.max_bytes:  # it would be dropped
            return ""
        try:
            return settings_for(whole, self.options.role_map)
        except Unusable:  # it is several values
            return ""


def read_conversations(paths: str | Path | Sequence[str | Path], **options: Any) -> Reading:
    """Open chat files for reading.

    Args:
        paths: a file, a folder (all of its *.json, *.jsonl, *.ndjson, *.parquet, *.arrow,
            *.feather, *.csv and *.tsv, at any depth, also as *.gz, *.bz2, *.xz and *.zst, and
            archives of them), a glob, or hub:<owner>/<name>; or several of these.
        options: as the fields of `ReadOptions`.

    Raises:
        DataError: there is no such file, or an option has no such value. Faults inside a file are
            raised when it is iterated.
    """
    chosen = ReadOptions(**options)
    sources: list[ChatFile | HubData] = []
    for place in [paths] if isinstance(paths, str | Path) else paths:
        if str(place).startswith(HUB):
            sources.append(HubData(str(place).removeprefix(HUB), chosen.hub_split))
        else:
            is_named = Path(place).expanduser().is_file()
            sources += [ChatFile(path, is_named) for path in find_files(place)]
    once = {source.name: source for source in sources}  # a file named twice is read once
    return Reading(list(once.values()), chosen)
