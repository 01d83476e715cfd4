"""Parse one raw chat: to a `Conversation`, or to the reason why it cannot be used.

A raw chat has ShareGPT's form {id, conversations: [{from, value}]}, OpenAI's {messages: [{role,
content}]}, or a mix of the two. msgspec decodes and checks it in one step; what it refuses is
looked at again in Python, which takes what JSON has no room for (NaN, halves of surrogate pairs,
control characters) and names what is wrong with the rest.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

ROLES = ("system", "user", "assistant", "tool")
_NAMES = {
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bing bard model bot function_call",
    "system": "system developer",
    "tool": "tool function observation function_response tool_response ipython",
}
_ROLE_OF = {name: role for role, names in _NAMES.items() for name in names.split()}

NOT_UTF8 = "not valid UTF-8"
NOT_JSON = "not valid JSON"
TOO_DEEP = "nested too deeply"
NOT_OBJECT = "not a JSON object"
NO_LIST = "no list of conversations or messages"
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
COLUMNS = ("conversations", "messages", "id", "system")
"""What is read of a table."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One turn; role is one of `ROLES`. The content may hold lone surrogates."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """A chat with an id that stays the same from run to run."""

    id: str
    messages: list[Message]


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


class _Unusable(Exception):
    """Its text is the reason."""


class ChatParser:
    """Makes conversations of raw chats; `role_map` adds to the names of roles that are known."""

    def __init__(self, role_map: Mapping[str, str] | None = None) -> None:
        self._role_of = {**_ROLE_OF, **(role_map or {})}

    def parse(self, raw: RawChat) -> Conversation | str:
        """Return a conversation, or why the chat cannot be used."""
        try:
            conversation = None if isinstance(raw, dict) else self._parse_strictly(raw)
            return conversation or self._parse_leniently(raw)
        except _Unusable as reason:
            return str(reason)

    def _parse_strictly(self, raw: msgspec.Raw | bytes | memoryview) -> Conversation | None:
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
        chat_id = _content_id(raw) if chat.id in (None, "") else str(chat.id)
        return _checked(chat_id, messages, chat.system)

    def _parse_leniently(self, raw: RawChat) -> Conversation:
        chat = _decoded(raw)
        messages = [self._message(turn) for turn in _turns(chat)]
        if not messages:
            raise _Unusable(NO_TURNS)
        system = chat.get("system")
        chat_id = _usable_id(chat.get("id")) or _content_id(raw)
        return _checked(chat_id, messages, None if system is None else _text(system))

    def _message(self, turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise _Unusable(NOT_A_TURN)
        # A table has a null where a form has no such field.
        name = turn.get("from") or turn.get("role")
        content = turn.get("content") if turn.get("value") is None else turn.get("value")
        if turn.get("tool_calls") or turn.get("function_call"):
            # Without them, a turn would end where the model calls a tool.
            raise _Unusable(TOOL_CALLS)
        if not (turn.keys() & {"from", "role"} and turn.keys() & {"value", "content"}):
            raise _Unusable(NOT_A_TURN)
        role = None
        if isinstance(name, str):
            role = self._role_of.get(name) or self._role_of.get(name.lower())
        if role is None:
            raise _Unusable(UNKNOWN_ROLE)
        if content is None:
            raise _Unusable(NULL)
        if role == "assistant" and turn.get("weight") == 0:
            # OpenAI's form marks so what is only to be read: masks know no such turns.
            raise _Unusable(NOT_TO_TRAIN)
        return Message(role, _text(content))


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
    try:
        return raw if isinstance(raw, dict) else decode_leniently(raw_bytes(raw))
    except UnicodeDecodeError as error:
        raise _Unusable(NOT_UTF8) from error
    except ValueError as error:
        raise _Unusable(NOT_JSON) from error
    except RecursionError as error:
        raise _Unusable(TOO_DEEP) from error


def _turns(chat: Any) -> list[Any]:
    if not isinstance(chat, dict):
        raise _Unusable(NOT_OBJECT)
    values = (chat.get("conversations"), chat.get("messages"))
    lists = [turns for turns in values if isinstance(turns, list)]
    if not lists:
        raise _Unusable(NO_LIST)
    return lists[0] or lists[-1]


def _text(content: Any) -> str:
    """Return the text of a content: it is one, or a list of parts that are."""
    if isinstance(content, str):
        return content
    if content is None:
        raise _Unusable(NULL)
    if not isinstance(content, list):
        raise _Unusable(NOT_TEXT)
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise _Unusable(NOT_TEXT_PART)
    return part


def _usable_id(value: Any) -> str:
    """Return an id as text that any file can hold, empty where there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return re.sub("[\ud800-\udfff]", "\ufffd", str(value))


def _content_id(raw: RawChat) -> str:
    return "sha256-" + hashlib.sha256(raw_bytes(raw).strip()).hexdigest()[:16]


def _checked(chat_id: str, messages: list[Message], system: str | None) -> Conversation:
    """Return the conversation if there is something to train on."""
    if system and not system.isspace():
        first = Message("system", system)
        if messages[0] != first:
            messages = [first, *messages]
    if not any(m.role == "assistant" and m.content.strip() for m in messages):
        raise _Unusable(NO_REPLY)
    return Conversation(chat_id, messages)
