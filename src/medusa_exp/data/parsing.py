"""Parse one raw chat: to a `Conversation`, or to the reason why it cannot be used.

Most raw chats have ShareGPT's form {id, conversations: [{from, value}]}, OpenAI's {messages:
[{role, content}]}, or a mix of the two: msgspec decodes and checks them in one step. What it
refuses is looked at again in Python, which knows all `FORMS`, takes what JSON has no room for (NaN,
halves of surrogate pairs, control characters) and names what is wrong with the rest.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from medusa_exp.data.forms import (
    FORMS,
    ROLE_OF,
    Ambiguous,
    Chat,
    Form,
    Unusable,
    by_columns,
    columns_of,
    id_in,
    unused_keys,
)

NOT_UTF8 = "not valid UTF-8"
NOT_JSON = "not valid JSON"
TOO_DEEP = "nested too deeply"
NOT_OBJECT = "not a JSON object"
NO_FORM = "no known form of chat"
NO_TURNS = "no turns"
NOT_A_TURN = "a turn is not an object with a role and a content"
UNKNOWN_ROLE = "unknown role"
TOOL_CALLS = "tool calls are not supported"
NOT_TO_TRAIN = "an assistant turn of weight 0, not to be trained"
NULL = "content is null"
NOT_TEXT = "content is not text"
NOT_TEXT_PART = "content has a part that is not text"
NO_REPLY = "no assistant turn"

RawChat = msgspec.Raw | bytes | memoryview | dict[str, Any]
"""JSON text, or the row of a table."""
_OF_ID = ("conversations", "messages", "id", "system")
"""What the id of a row without one is made of, where it has the first form."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One turn; role is one of `ROLES`. The content may hold lone surrogates."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """A chat with an id that stays the same from run to run."""

    id: str
    messages: list[Message]
    source: str = ""
    """The file, or the member of an archive, that it stands in."""
    number: int = 0
    """Its place there, from 1."""

    def described(self) -> str:
        """Return what messages call it."""
        place = f" ({self.source}, record {self.number})" if self.number else ""
        return f"conversation {self.id}{place}"


# The defaults are no values of their type: an explicit null is refused, a missing field is not.
class _Turn(msgspec.Struct, gc=False):
    source: str = msgspec.field(name="from", default="")
    role: str = ""
    value: str = None  # type: ignore[assignment]
    content: str = None  # type: ignore[assignment]
    tool_calls: msgspec.Raw = msgspec.Raw()
    function_call: msgspec.Raw = msgspec.Raw()
    weight: float = 1.0


class _Chat(msgspec.Struct, gc=False):
    conversations: list[_Turn] | None = None
    messages: list[_Turn] | None = None
    id: str | int | None = None
    system: str | None = None


_decode = msgspec.json.Decoder(_Chat).decode
_OTHER_KEYS = {key for form in FORMS.values() for key in form.keys} - {*FORMS["messages"].keys}


class ChatParser:
    """Makes conversations of the raw chats of one source."""

    def __init__(
        self,
        role_map: Mapping[str, str] | None = None,
        form: str = "auto",
        columns: Mapping[str, str] | None = None,
        source: str = "",
        num_looked_at: int = 100,
    ) -> None:
        """Choose what is read.

        Args:
            role_map: adds to the names of roles that are known.
            form: one of `FORMS`, or auto, which takes the one that a raw chat fits.
            columns: as `by_columns` has them; then nothing else is read.
            source: the name of the source, for messages.
            num_looked_at: raw chats, the first ones, that are looked at for keys that are not
                used, and for those of another form beside their messages.
        """
        self._role_of = {**ROLE_OF, **(role_map or {})}
        self._forms = forms_of(form, columns)
        self._is_direct = "messages" in self._forms
        self._num_looked_at = num_looked_at
        self.num_looked_at = 0
        self.unused: Counter[str] = Counter()
        """Key -> number of those chats that hold something under it which is not read."""
        self._source = source
        self.found: Counter[str] = Counter()
        """Name of a form -> raw chats that were read in it, but for the first form."""
        self.detail = ""
        """What showed why the newest raw chat could not be used."""

    def parse(self, raw: RawChat, number: int = 0) -> Conversation | str:
        """Return a conversation, or why the chat cannot be used.

        Raises:
            Ambiguous: it can be read in several ways.
        """
        try:
            if self._is_direct and not isinstance(raw, dict):
                conversation = self._parse_strictly(raw, number)
                if conversation is not None:
                    return conversation
            return self._parse_leniently(raw, number)
        except Unusable as reason:
            self.detail = reason.detail
            return str(reason)

    def _parse_strictly(
        self, raw: msgspec.Raw | bytes | memoryview, number: int
    ) -> Conversation | None:
        """Return None where the chat needs a closer look."""
        try:
            chat = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        role_of = self._role_of.get
        messages = []
        for turn in chat.conversations or chat.messages or ():
            role = role_of(turn.source or turn.role)
            content = turn.content if turn.value is None else turn.value
            if role is None or content is None or turn.tool_calls or turn.function_call:
                return None
            if not turn.weight:
                return None
            messages.append(Message(role, content))
        if not messages:
            return None
        if number <= self._num_looked_at:
            record = msgspec.json.decode(raw)
            if len(self._forms) > 1 and not _OTHER_KEYS.isdisjoint(record):
                return None
            self._note_unused(record, "messages")
        chat_id = _content_id(raw) if chat.id in (None, "") else str(chat.id)
        return Conversation(chat_id, _checked(messages, chat.system), self._source, number)

    def _parse_leniently(self, raw: RawChat, number: int) -> Conversation:
        record = _decoded(raw)
        name, messages = self._read(record)
        if number <= self._num_looked_at:
            self._note_unused(record, name)
        if name == "messages":
            given = record.get("id")
            raw = {k: v for k, v in raw.items() if k in _OF_ID} if isinstance(raw, dict) else raw
        else:
            given = id_in(record)
            self.found[name] += 1
        chat_id = _usable_id(given) or _content_id(raw)
        return Conversation(chat_id, messages, self._source, number)

    def _note_unused(self, record: Any, form: str) -> None:
        self.num_looked_at += 1
        self.unused.update(unused_keys(record, form, self._forms[form].keys))

    def _read(self, record: Any) -> tuple[str, list[Message]]:
        """Return the messages of a record and the name of its form."""
        if not isinstance(record, dict | list):
            raise Unusable(NOT_OBJECT)
        is_list = isinstance(record, list)
        fitting = {
            name: chat
            for name, form in self._forms.items()
            if (is_list or any(key in record for key in form.keys)) and (chat := form.read(record))
        }
        if not fitting:
            if not isinstance(record, dict):
                raise Unusable(NOT_OBJECT)
            raise Unusable(NO_FORM, f"its keys are {', '.join(map(str, record))}")
        found: dict[str, list[Message]] = {}
        for name, chat in fitting.items():
            try:
                found[name] = self._messages(chat)
            except Unusable:
                if len(fitting) == 1:
                    raise
        if not found:
            self._messages(next(iter(fitting.values())))
        first, *others = found
        if any(found[other] != found[first] for other in others):
            raise Ambiguous(f"the forms {' and '.join(found)}")
        return first, found[first]

    def _messages(self, chat: Chat) -> list[Message]:
        if not chat.turns:
            raise Unusable(NO_TURNS)
        messages = [self._message(turn) for turn in chat.turns]
        return _checked(messages, None if chat.system is None else _text(chat.system))

    def _message(self, turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise Unusable(NOT_A_TURN, f"it is {turn!r:.60}")
        # A table has a null where a form has no such field.
        name = turn.get("from") or turn.get("role")
        content = turn.get("content") if turn.get("value") is None else turn.get("value")
        if turn.get("tool_calls") or turn.get("function_call"):
            # Without them, a turn would end where the model calls a tool.
            raise Unusable(TOOL_CALLS)
        if not (turn.keys() & {"from", "role"} and turn.keys() & {"value", "content"}):
            raise Unusable(NOT_A_TURN, f"its keys are {', '.join(map(str, turn))}")
        role = None
        if isinstance(name, str):
            role = self._role_of.get(name) or self._role_of.get(name.lower())
        if role is None:
            raise Unusable(UNKNOWN_ROLE, f"the role is {name!r}")
        if content is None:
            raise Unusable(NULL)
        if role == "assistant" and turn.get("weight") == 0:
            # OpenAI's form marks so what is only to be read: masks know no such turns.
            raise Unusable(NOT_TO_TRAIN)
        return Message(role, _text(content))


def forms_of(form: str, columns: Mapping[str, str] | None) -> dict[str, Form]:
    """Return the forms that are looked for."""
    if columns:
        return {"columns": by_columns(columns)}
    return FORMS if form == "auto" else {form: FORMS[form]}


def columns_to_read(form: str, columns: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return what is read of a table: names of columns, in the order that they are asked for."""
    return columns_of(forms_of(form, columns))


def content_digest(conversation: Conversation) -> bytes:
    """Return 16 bytes that are the same for the same roles and contents, whatever the id."""
    digest = hashlib.sha256()
    for message in conversation.messages:
        digest.update(f"{message.role} {len(message.content)} ".encode())
        digest.update(message.content.encode("utf-8", "surrogatepass"))
    return digest.digest()[:16]


def raw_bytes(raw: RawChat) -> bytes:
    """Return the text of a raw chat; of a row, its text as JSON."""
    return msgspec.json.encode(raw) if isinstance(raw, dict) else bytes(raw)


def decode_leniently(text: bytes) -> Any:
    """Decode what Python's json takes, which is more than JSON.

    Raises:
        ValueError: it is not JSON by any measure, or (UnicodeDecodeError) not UTF-8.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text.decode("utf-8", "surrogatepass").removeprefix("\ufeff"), strict=False)


def _decoded(raw: RawChat) -> Any:
    if isinstance(raw, dict):
        return raw
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


def _text(content: Any) -> str:
    """Return the text of a content: it is one, or a list of parts that are."""
    if isinstance(content, str):
        return content
    if content is None:
        raise Unusable(NULL)
    if not isinstance(content, list):
        raise Unusable(NOT_TEXT)
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise Unusable(NOT_TEXT_PART)
    return part


def _usable_id(value: Any) -> str:
    """Return an id as text that any file can hold, empty where there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return re.sub("[\ud800-\udfff]", "\ufffd", str(value))


def _content_id(raw: RawChat) -> str:
    return "sha256-" + hashlib.sha256(raw_bytes(raw).strip()).hexdigest()[:16]


def _checked(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages, after the system text, if there is something to train on."""
    if system and not system.isspace():
        first = Message("system", system)
        if messages[0] != first:
            messages = [first, *messages]
    if not any(m.role == "assistant" and m.content.strip() for m in messages):
        raise Unusable(NO_REPLY)
    return messages
