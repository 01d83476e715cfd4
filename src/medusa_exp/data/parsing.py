"""Parse one raw chat: to a `Conversation`, or to the reason why it cannot be used.

Most raw chats have ShareGPT's form {id, conversations: [{from, value}]}, OpenAI's {messages:
[{role, content}]}, or a mix of the two: msgspec decodes and checks them in one step. What it
refuses is looked at again in Python, which knows all `FORMS`, takes what JSON has no room for (NaN,
halves of surrogate pairs, control characters) and names what is wrong with the rest.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from msgspec.structs import astuple

from medusa_exp.data.faults import printable
from medusa_exp.data.forms import ANSWERED, FORMS, LABELLED, MAY_LACK, forms_of
from medusa_exp.data.messages import Conversation, Message, checked
from medusa_exp.data.pairs import CHOICES, REPLIES, SEVERAL_ANSWERS
from medusa_exp.data.raw_chats import (
    RawChat,
    TooLong,
    decode_leniently,
    num_bytes,
    raw_bytes,
    whole_letters,
)
from medusa_exp.data.records import NOT_ALIKE, SYSTEMS, Ambiguous, Chat, has, id_in
from medusa_exp.data.turn_lists import is_alternation, known_names, renamed
from medusa_exp.data.turns import (
    CALLERS,
    LABELS,
    NOT_TEXT,
    PICTURES,
    REASONING,
    ROLE_OF,
    ROLES,
    TOOLS,
    USED,
    Unusable,
    check_one_text,
    fields_of,
    first_filled,
    from_json_text,
    has_calls,
    is_switched_on,
    name_in,
    reasoning_beside,
    reasoning_of,
    refuse_pictures,
    role_called,
    texts_of,
    tools_of,
    with_calls,
)
from medusa_exp.data.unread import unused_keys

NOT_UTF8 = "not valid UTF-8"
NOT_JSON = "not valid JSON"
TOO_DEEP = "nested too deeply"
NOT_OBJECT = "not a JSON object"
NO_FORM = "no known form of chat"
NO_TURNS = "no turns"
NOT_A_TURN = "a turn is not an object with a role and a content"
UNKNOWN_ROLE = "unknown role"
BAD_ANSWER = "an answer that is marked as bad"
TOO_LARGE = "larger than dataset.max_record_bytes"


_OF_ID = ("conversations", "messages", "id", "system")
"""What the id of a row without one is made of, where it has the first form."""
_NOT_OF_ID = {*TOOLS, *PICTURES, "choices", "currNode", "conv"}
"""What it is not made of in another form: earlier runs did not read it.

All other keys that `columns_of` names count, in its order: one that a form newly reads beside its
texts belongs here, or the ids of all rows that have it change, and with them the splits.
"""
_OF_COLUMNS = {*LABELS, *REASONING, *CHOICES} - _NOT_OF_ID
"""What it is made of only where dataset.columns names it: so were those of earlier runs."""
_NOTHING = (b"", b"null", b'""', b"[]", b"{}", b'"[]"')
_UNSAID = ("[]", "{}")  # a set would hash each text
"""Contents in whose place other words count, where a turn has some."""

_RAW = msgspec.Raw()


def _with_raw(base: type[msgspec.Struct], keys: Iterable[str]) -> type[Any]:
    """Return a struct with these further fields, whose values stay undecoded."""
    fields = [(key, msgspec.Raw, _RAW) for key in keys]
    return msgspec.defstruct(base.__name__, fields, bases=(base,), gc=False)


# The defaults are no values of their type: an explicit null is refused, a missing field is not.
class _TurnBase(msgspec.Struct, gc=False):
    source: str = msgspec.field(name="from", default="")
    role: str = ""
    value: str = None  # type: ignore[assignment]
    content: str = None  # type: ignore[assignment]
    reasoning_content: str | None = None


_Turn = _with_raw(
    _TurnBase,
    sorted({*USED, *PICTURES, "channel", "isThought", "children"} - {"reasoning_content"}),
)
_NUM_SAID = len(_TurnBase.__struct_fields__)
_PLAIN = astuple(_Turn())[_NUM_SAID:]


class _ChatBase(msgspec.Struct, gc=False):
    conversations: list[_Turn] | None = None  # type: ignore[valid-type]
    messages: list[_Turn] | None = None  # type: ignore[valid-type]
    id: str | int | None = None
    system: str | None = None
    label: Any = None
    kto_tag: Any = None


_ChatWithMore = _with_raw(_ChatBase, (*FORMS["messages"].more, "chosen"))
_Chat = _with_raw(_ChatWithMore, (*SYSTEMS[1:], *TOOLS, *PICTURES, *REASONING))
_NUM_OF_CHAT = len(_ChatBase.__struct_fields__)
_NUM_WITH_MORE = len(_ChatWithMore.__struct_fields__)
_ONLY = astuple(_Chat())[_NUM_WITH_MORE:]
_NO_MORE = astuple(_Chat())[_NUM_OF_CHAT:_NUM_WITH_MORE]
_decode = msgspec.json.Decoder(_Chat).decode


def _hold(values: tuple[Any, ...]) -> bool:
    """Is there something in fields whose values were left undecoded?"""
    return any(bytes(value) not in _NOTHING for value in values)


def _matter(beside: tuple[Any, ...]) -> bool:
    """Is there something in fields of a whole record, but for what Nemotron says of `REASONING`?"""
    others, thoughts = beside[: -len(REASONING)], beside[-len(REASONING) :]
    is_told = any(bytes(value) not in (*_NOTHING, b'"on"', b'"off"') for value in thoughts)
    return is_told or _hold(others)


_OTHER_KEYS = {key for form in FORMS.values() for key in form.keys} - {*FORMS["messages"].keys}


class ChatParser:
    """Makes conversations of the raw chats of one source."""

    def __init__(
        self,
        role_map: Mapping[str, str] | None = None,
        form: str = "auto",
        columns: Mapping[str, str] | None = None,
        source: str = "",
        look_at: int = 100,
        max_bytes: int | None = None,
    ) -> None:
        """Choose what is read.

        Args:
            role_map: adds to the names of roles that are known.
            form: one of `FORMS`, or auto, which takes the one that a raw chat fits.
            columns: as `by_columns` has them; then nothing else is read.
            source: the name of the source, for messages.
            look_at: so many raw chats are looked at for keys that are not used, and for those of
                another form beside their messages.
            max_bytes: what is larger is not looked at.
        """
        self._max_bytes = max_bytes
        role_map = role_map or {}
        self._role_of = {**ROLE_OF, **role_map}
        self._names = known_names(role_map)
        self._callers = {*CALLERS} - {*role_map}
        self._role_at_once = {k: v for k, v in self._role_of.items() if k not in self._callers}
        """Whose turns are read as they stand: what a caller says is to be decoded."""
        self._forms = forms_of(form, columns)
        self._is_row = False
        self._is_direct = "messages" in self._forms
        self._look_at = look_at
        self.num_looked_at = 0
        self.unused: Counter[str] = Counter()
        """Key -> number of those chats that hold something under it which is not read."""
        self._source = source
        self.found: Counter[str] = Counter()
        """Name of a form -> raw chats that were read in it, but for the first form."""
        self.absent = {path for role, path in (columns or {}).items() if role in MAY_LACK}
        """Paths of columns that a record may lack, and that none has had."""
        self.keys: tuple[str, ...] = ()
        """Of the first record, where there are such paths."""
        self.detail = ""
        """What showed why the newest raw chat could not be used."""
        self.stranger: Any = None
        """Whose role is not known in the newest raw chat that was refused for that."""

    def parse(self, raw: RawChat, number: int = 0) -> Conversation | str:
        """Return a conversation, or why the chat cannot be used.

        Raises:
            Ambiguous: it can be read in several ways.
        """
        if isinstance(raw, TooLong) or (self._max_bytes and num_bytes(raw) > self._max_bytes):
            self.detail = f"it has {num_bytes(raw):,} bytes"
            return TOO_LARGE
        try:
            if self._is_direct and not isinstance(raw, dict):
                conversation = self._parse_strictly(raw, number)
                if conversation is not None:
                    return conversation
            return self._parse_leniently(raw, number)
        except Unusable as reason:
            self.detail = printable(reason.detail)
            return str(reason)

    def _parse_strictly(
        self, raw: msgspec.Raw | bytes | memoryview, number: int
    ) -> Conversation | None:
        """Return None where the chat needs a closer look."""
        try:
            chat = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        role_of = self._role_at_once.get
        messages = []
        if (chat.conversations and chat.messages) or chat.label is False or chat.kto_tag is False:
            return None
        for turn in chat.conversations or chat.messages or ():
            fields = astuple(turn)
            source, name, value, content, thought = fields[:_NUM_SAID]
            role = role_of(source or name)
            if (source and name) or (value and content):
                return None
            content = value or content
            if role is None or not content or role == "tool" or content in _UNSAID:
                return None  # other words may say it
            if (beside := fields[_NUM_SAID:]) != _PLAIN and _hold(beside):
                return None
            messages.append(Message(role, content, thought or "" if role == "assistant" else ""))
        fields = astuple(chat)
        if chat.system is not from_json_text(chat.system):  # it may be parts of a text
            return None
        beside = fields[_NUM_WITH_MORE:]
        if not messages or (beside != _ONLY and _matter(beside)):
            return None
        answers = fields[_NUM_OF_CHAT:_NUM_WITH_MORE]
        if answers != _NO_MORE and messages[-1].role == "user":
            return None
        try:
            messages = checked(messages, chat.system)
        except Unusable:  # the answer may stand elsewhere
            return None
        if number <= self._look_at:
            record = value_of(raw)
            if len(self._forms) > 1 and not _OTHER_KEYS.isdisjoint(record):
                return None
            self._note_unused(record, "messages")
        chat_id = _content_id(raw) if chat.id in (None, "") else str(chat.id)
        return Conversation(chat_id, messages, self._source, number)

    def _parse_leniently(self, raw: RawChat, number: int) -> Conversation:
        record = renamed(value_of(raw), self._names)
        self._is_row = isinstance(raw, dict)
        if self.absent:
            self.absent = {path for path in self.absent if not has(record, path)}
            self.keys = self.keys or tuple(record if isinstance(record, dict) else ())
        name, messages, tools, chat = self._read(record)
        if number <= self._look_at:
            self._note_unused(record, name, chat)
        if name == "messages":
            given = record.get("id")
            of_id = {*_OF_ID, *chat.more}.difference(REASONING)
            raw = {k: v for k, v in raw.items() if k in of_id} if isinstance(raw, dict) else raw
        else:
            given = id_in(record)
            if isinstance(raw, dict):
                not_of_id = _NOT_OF_ID | _OF_COLUMNS.difference(self._forms[name].keys)
                raw = {key: value for key, value in raw.items() if key not in not_of_id}
            self.found[name] += 1
        chat_id = _usable_id(given) or _content_id(raw)
        return Conversation(chat_id, messages, self._source, number, tools)

    def _note_unused(self, record: Any, form: str, chat: Chat | None = None) -> None:
        self.num_looked_at += 1
        keys = self._forms[form].keys
        if chat is not None:
            keys += tuple(key for key in chat.more if key in (*REPLIES, "history"))
        unused = unused_keys(record, form, keys)
        if chat is not None:
            unused = unused.difference(chat.more).union(chat.passed_over)
        self.unused.update(sorted(map(printable, unused)))

    def _read(self, record: Any) -> tuple[str, list[Message], str, Chat]:
        """Return the name of a record's form, its messages, its tools, and how it was read."""
        if not isinstance(record, dict | list):
            raise Unusable(NOT_OBJECT)
        fitting: dict[str, Chat] = {}
        found: dict[str, list[Message]] = {}
        faults: list[Unusable] = []
        for name, form in self._forms.items():
            if isinstance(record, dict) and record.keys().isdisjoint(form.keys):
                continue
            try:
                if chat := form.read(record):
                    fitting[name] = chat
                    found[name] = self._messages(chat)
            except Unusable as fault:
                # Behind the first records of a file, messages are read whatever stands beside them.
                if name not in fitting and "messages" not in found:
                    raise
                faults.append(fault)
        if not fitting:
            if not isinstance(record, dict):
                raise Unusable(NOT_OBJECT)
            raise Unusable(NO_FORM, f"its keys are {', '.join(map(str, record))}")
        if isinstance(record, dict) and "columns" not in fitting:
            for place in (record, *(chat.tools_in for chat in fitting.values())):
                refuse_pictures(place)
        if not found:
            raise faults[0]
        before = found.get("messages", [])
        if before and before == found.get("chosen", [])[: len(before)] != found["chosen"]:
            del found["messages"]  # to which the preferred answer is the end
        first, *others = found
        if any(found[other] != found[first] for other in others):
            choices = " or ".join(f"dataset.form={name}" for name in found)
            raise Ambiguous(
                f"can be read by the forms {' and '.join(found)}{NOT_ALIKE}", f"Choose: {choices}."
            )
        if isinstance(record, dict) and first in LABELLED:
            for key in LABELS:
                if record.get(key) is False:
                    raise Unusable(BAD_ANSWER, f"its {key} is false")
        beside = fitting[first].tools_in or (record if isinstance(record, dict) else {})
        tools = "" if first == "columns" else tools_of(beside, self._is_row)
        messages, chat = _with_reasoning(record, first, found[first], fitting[first])
        return first, messages, tools, chat

    def _messages(self, chat: Chat) -> list[Message]:
        if not chat.turns:
            raise Unusable(NO_TURNS)
        messages = [self._message(turn) for turn in chat.turns]
        try:
            system = "" if chat.system is None else texts_of(chat.system)[1]
        except Unusable as fault:
            raise Unusable(str(fault), f"the system text is {chat.system!r:.60}") from fault
        return checked(messages, system)

    def _message(self, turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise Unusable(NOT_A_TURN, f"it is {turn!r:.60}")
        name = name_in(turn)
        content = first_filled(turn, ("value", "content"))
        calls = has_calls(turn)
        if not (turn.keys() & {"from", "role"} and (calls or turn.keys() & {"value", "content"})):
            raise Unusable(NOT_A_TURN, f"its keys are {', '.join(map(str, turn))}")
        check_one_text(turn, self._role_of)
        role = role_called(name, self._role_of)
        if role not in ROLES:
            self.stranger = name
            raise Unusable(UNKNOWN_ROLE, f"the role is {name!r}")
        refuse_pictures(turn)
        _check_is_text(content, role)
        if isinstance(name, str) and name.lower() in self._callers:
            turn, content = with_calls(turn), ""
        fields = fields_of(turn, role, self._is_row)
        thought, text = texts_of("" if content is None and fields else content)
        if role != "assistant":
            return Message(role, text, fields=fields)
        return Message(role, text, reasoning_of(turn) or thought, is_switched_on(turn), fields)


def _with_reasoning(
    record: Any, form: str, messages: list[Message], chat: Chat
) -> tuple[list[Message], Chat]:
    """Return messages, the answer with what a record says beside it of the thoughts before it.

    Not of several answers, unless the last stands apart, nor where it tells its thoughts itself.
    """
    keys, thought = reasoning_beside(record) if form in ANSWERED else ((), chat.reasoning)
    last = messages[-1]
    if not thought or last.role != "assistant" or last.reasoning:
        return messages, chat
    is_apart = form == "columns" or not {*chat.more}.isdisjoint((*REPLIES, "choices"))
    if not is_apart and sum(message.role == "assistant" for message in messages) > 1:
        return messages, chat
    if "<think>" in last.content or thought.strip() in last.content:
        return messages, chat
    messages = [*messages[:-1], msgspec.structs.replace(last, reasoning=thought)]
    return messages, replace(chat, more=(*chat.more, *keys))


def _check_is_text(content: Any, role: str) -> None:
    """Raise Unusable where a content is no text, or several."""
    if isinstance(content, bool | int | float | dict | bytes):
        keys = f"an object of {', '.join(map(str, content))}" if isinstance(content, dict) else ""
        what = keys or f"{content!r:.60}"
        raise Unusable(NOT_TEXT, f"it is {what} in a turn of role {role}: write it as text")
    if role == "assistant" and is_alternation(content):
        raise Unusable(SEVERAL_ANSWERS, f"they are {len(content)}, the first {content[0]!r:.60}")


def value_of(raw: RawChat) -> Any:
    """Return the JSON value of a raw chat; raise Unusable where it cannot be decoded."""
    if isinstance(raw, dict):
        return raw
    assert not isinstance(raw, TooLong)
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return decode_leniently(raw_bytes(raw))
    except UnicodeDecodeError as error:
        raise Unusable(NOT_UTF8) from error
    except ValueError as error:
        raise Unusable(NOT_JSON) from error
    except RecursionError as error:
        raise Unusable(TOO_DEEP) from error


def _usable_id(value: Any) -> str:
    """Return an id as text that any file can hold, empty where there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return whole_letters(str(value))


def _content_id(raw: RawChat) -> str:
    return "sha256-" + hashlib.sha256(raw_bytes(raw).strip()).hexdigest()[:16]
