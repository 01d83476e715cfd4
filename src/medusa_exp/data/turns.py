"""What a record and its turns hold beside roles and texts: reasoning, tools, switches, pictures.

Each is used, or the record is dropped for a named reason: the text that is trained would be another
one without it.
"""

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = ("sender", "speaker", "author")
WHO = ("from", "role", *SPEAKERS)
"""Keys of who speaks in a turn, the first of which counts."""
_NAMES = {
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bing bard model bot ai function_call tool_call",
    "system": "system developer",
    "tool": "tool function observation function_response tool_response ipython",
}
ROLE_OF = {name: role for role, names in _NAMES.items() for name in names.split()}
"""Name of a role in a file, in small letters -> role."""
CALLERS = ("function_call", "tool_call")
"""Names of the assistant where it calls tools: its content is the calls."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What the assistant thought before it spoke."""
CALLS = ("tool_calls", "function_call")
OF_TOOLS = ("tool_call_id", "name")
"""Which call a turn of a tool answers."""
SWITCHES = ("weight", "train", "training", "loss")
"""Whether an assistant's turn is to be trained: 0, false; 1, true."""
TOOLS = ("tools", "functions")
"""What could be called, beside the turns."""
LABELS = ("label", "kto_tag")
"""Whether an answer is good, beside it: true or false. Other values mean something else."""
PICTURES = ("images", "image", "videos", "video", "audios", "audio")
ANALYSIS = "analysis"
CHANNELS = (ANALYSIS, "commentary", "final")
"""What an assistant's turn is, in harmony's key `channel`; what it says in the first is thought."""
USED = {*REASONING, *CALLS, *SWITCHES, "tool_call_id"}
"""Keys of turns that are read, or refused."""

BAD_CALLS = "tool calls in an unknown form"
BAD_TOOLS = "tools in an unknown form"
BAD_SWITCH = "a turn's switch of training that is neither 0 nor 1"
NOT_TO_TRAIN = "no assistant turn that is to be trained"
PICTURE = "a picture, a sound or a video"
NOT_TEXT = "content is not text"
NOT_TEXT_PART = "content has a part that is not text"
BAD_REASONING = "reasoning that is not one text"
NULL = "content is null"
UNCLEAR_TREE = "messages that hold their children, between others"
TWO_SYSTEMS = "two system texts that differ"
TWO_TEXTS = "a turn with two roles or two texts"
_THOUGHTS = ("thinking", "reasoning")
_SWITCH_WORDS = {
    *("", "on", "off", "true", "false", "yes", "no", "none", "null", "n/a", "auto", "think"),
    *("no_think", "enabled", "disabled", "minimal", "low", "medium", "high", "xhigh"),
}
"""What stands under a key of `REASONING` in a record that tells by it how to think, if at all."""
_SAID = ("text", "input_text", "output_text")
ENTITIES = "text_entities"
"""A key of messages in Telegram's exports alone."""
_BESIDE_ENTITIES = ("photo", "media_type", "file")
# Telegram's pieces of a message, each with its text.
_ENTITIES = (
    *("plain", "bold", "italic", "underline", "strikethrough", "spoiler", "code", "pre"),
    *("blockquote", "link", "text_link", "mention", "mention_name", "hashtag", "cashtag"),
    *("bot_command", "email", "phone", "bank_card", "custom_emoji"),
)
_OF_TEXT = {"text", "thought", "thoughtSignature", "thought_signature"}
"""Keys of a part without a type, as Gemini and Bedrock have them."""
_IN_OBJECTS = ("text", "parts", "value", "content")
"""Keys of what an object says that stands in the place of a text."""
_SHOWN = ("image", "audio", "video", "file")

_OF_CALLS = {
    *("tool_use", "tool_result", "function_call", "function_call_output"),
    *("functionCall", "functionResponse", "function_response", "toolUse", "toolResult"),
}
"""Types of parts that are calls or their results, or the keys of such parts."""
_ARGUMENTS = ("arguments", "parameters", "args")

_EMPTY: tuple[Any, ...] = (None, "", "[]", "{}", [], {})

Record = dict[str, Any]


class Unusable(Exception):
    """A raw chat that cannot be used: the reason, and what shows it in this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def is_held(value: Any) -> bool:
    """Is there something in a field? In a table, all records have all fields."""
    if isinstance(value, list):
        return any(map(is_held, value))
    return value not in _EMPTY


def first_filled(item: Record, keys: tuple[str, ...]) -> Any:
    """Return what an item holds under the first of these keys that is filled, else is there.

    An empty list or object may be all that is said, as JSON in a text.
    """
    found = [item[key] for key in keys if item.get(key) is not None]
    return next(chain(filter(is_held, found), filter(None, found), found), None)


def said_in(content: Any) -> Any:
    """Return what an object in the place of a text says, as a text or parts; all else as it is.

    It is a part of a text by itself, or holds nothing but one of them, or a list: {"parts": [...]}.
    """
    if not isinstance(content, dict):
        return content
    there = {key for key, value in content.items() if value is not None}  # of a table, all are
    if "type" in there or {"text"} <= there <= _OF_TEXT:
        return [content]
    kind = content.get("content_type")
    held = {key for key in there - {"content_type"} if is_held(content[key])}
    keys = held or there & {*_IN_OBJECTS}
    if kind not in (None, "text") or len(keys) != 1 or not keys <= {*_IN_OBJECTS}:
        return content
    return as_parts(content[keys.pop()])


def as_parts(said: Any) -> Any:
    """Return texts in a list as parts of one text: as a list, they could be several answers."""
    if not isinstance(said, list):
        return said
    return [{"text": part} if isinstance(part, str) else part for part in said]


def name_in(turn: Record) -> Any:
    """Return what a turn calls who speaks: in a table, a null where its form has no such key."""
    return turn.get("from") or turn.get("role")


def refuse_pictures(record: Record) -> None:
    """Refuse what is told by more than its words.

    Raises:
        Unusable: there are pictures, sounds or videos in a record or a turn.
    """
    for key in PICTURES:
        if is_held(value := record.get(key)) and value is not False:
            raise Unusable(PICTURE, f"under {key}")
    if ENTITIES in record:
        if found := [key for key in _BESIDE_ENTITIES if is_held(record.get(key))]:
            raise Unusable(PICTURE, f"under {found[0]}")
        if not is_held(record.get("text")):
            raise Unusable(PICTURE, f"a message of no text, but {', '.join(map(str, record))}")


def texts_of(content: Any) -> tuple[str, str]:
    """Return the reasoning and the text of a content: it is a text, or a list of parts that are.

    Raises:
        Unusable: there is something else, or null.
    """
    if isinstance(content, str):
        return "", content
    if content is None:
        raise Unusable(NULL)
    if not isinstance(content, list):
        raise Unusable(NOT_TEXT)
    thoughts, said = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if _is_thought(part):
            thoughts.append(_part_text(part, ("text",)))
        elif kind in _THOUGHTS:
            thoughts.append(_part_text(part, (kind, "text")))
        else:
            said.append(_part_text(part, ("text",)))
    return "".join(thoughts), "".join(said)


def _part_text(part: Any, keys: tuple[str, ...]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Unusable(NOT_TEXT_PART, f"it is {part!r:.60}")
    kind = part.get("type")
    if isinstance(kind, str) and any(word in kind for word in _SHOWN):
        raise Unusable(PICTURE, f"a part of type {kind}")
    is_bare = kind is None and {key for key in part if part[key] is not None} <= _OF_TEXT
    if is_bare or kind in (*_THOUGHTS, *_SAID, *_ENTITIES):
        found = (said_in(part.get(key)) for key in keys)
        if (text := next((said for said in found if isinstance(said, str)), None)) is not None:
            return text
    raise Unusable(NOT_TEXT_PART, _about_part(part))


def _about_part(part: Record) -> str:
    """Say of which type a part is, and what to do."""
    kind = part.get("type")
    what = f"it is of type {kind}" if isinstance(kind, str) else f"its keys are {', '.join(part)}"
    if not _OF_CALLS.isdisjoint({str(kind), *part}):
        return (
            f"{what}: write calls as tool_calls of the turn, and what they gave as turns of role "
            "tool"
        )
    return f"{what}: leave such parts out, or write them as text"


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") is None and part.get("thought") is True


def thought_alone(turn: Any) -> str | None:
    """Return the text of an assistant's turn that is nothing but thought; None of all others."""
    if not isinstance(turn, dict):
        return None
    content = first_filled(turn, ("value", "content"))
    is_thought = isinstance(content, list) and content and all(map(_is_thought, content))
    is_thought = is_thought or turn.get("channel") == ANALYSIS or turn.get("isThought") is True
    if not is_thought:
        return None
    if role_called(name_in(turn)) != "assistant" or has_calls(turn):
        return None
    try:
        return "".join(texts_of(content))
    except Unusable:
        return None


def reasoning_of(turn: Record) -> str:
    """Return what a turn says of the thoughts before it, under whichever key.

    Raises:
        Unusable: it is no text, or several keys say different things.
    """
    found = [turn[key] for key in REASONING if is_held(turn.get(key)) and turn[key] is not False]
    if not found:
        return ""
    if not isinstance(found[0], str) or any(other != found[0] for other in found):
        raise Unusable(BAD_REASONING, f"it is {found[0]!r:.60}")
    return found[0]


def reasoning_beside(record: Record) -> tuple[tuple[str, ...], str]:
    """Return what a record says of the thoughts before its answer, and under which keys.

    Nothing, where that is no text, a word that switches thinking on or off, or not one text.
    """
    keys = tuple(key for key in REASONING if is_held(record.get(key)))
    said = {value if isinstance(value := record[key], str) else "" for key in keys}
    text = said.pop() if len(said) == 1 else ""
    is_switch = text.strip().strip("/").lower() in _SWITCH_WORDS
    return ((), "") if is_switch else (keys, text)


def is_switched_on(turn: Record) -> bool:
    """Tell whether an assistant's turn is to be trained.

    Raises:
        Unusable: a switch is neither on nor off.
    """
    is_on = True
    for key in SWITCHES:
        value = turn.get(key)
        if not is_held(value):
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Unusable(BAD_SWITCH, f"{key} is {value!r:.40}")
        is_on = is_on and bool(value)
    return is_on


def fields_of(turn: Record, role: str, is_row: bool) -> str:
    """Return as JSON what templates read of a turn beside role and content; empty without any.

    That are an assistant's tool calls, and what a tool's turn answers. `is_row` says that a table
    may have put nulls where a call had no such argument; in a text, nulls are somebody's own.

    Raises:
        Unusable: calls have no form that is known.
    """
    found: Record = {}
    if role == "assistant" and (calls := _calls(_without_nulls(turn) if is_row else turn)):
        found["tool_calls"] = calls
    if role == "tool":
        found = {key: turn[key] for key in OF_TOOLS if isinstance(turn.get(key), str) and turn[key]}
    return json.dumps(found, ensure_ascii=False) if found else ""


def with_calls(turn: Record) -> Record:
    """Return a turn whose content is tool calls, {name, arguments} or a list of them, with these.

    Raises:
        Unusable: it is something else.
    """
    content = first_filled(turn, ("value", "content"))
    if has_calls(turn) and not is_held(content):
        return turn
    calls = from_json_text(content)
    if has_calls(turn) or not is_held(calls) or not isinstance(calls, dict | list):
        said = f"a turn of calls says {content!r:.60}"
        remedy = f"write it as JSON, or have it as text by 'dataset.role_map={{{name_in(turn)}: "
        raise Unusable(BAD_CALLS, f"{said}: {remedy}assistant}}'")
    beside = {key: value for key, value in turn.items() if key != "value"}
    return {**beside, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def is_caller(name: Any) -> bool:
    """Is a role's name that of the assistant where it calls tools?"""
    return isinstance(name, str) and name.lower() in CALLERS


def has_calls(turn: Record) -> bool:
    """Does a turn call tools, in any form?"""
    return any(is_held(turn.get(key)) for key in CALLS)


def _calls(turn: Record) -> list[Record]:
    if not has_calls(turn):
        return []
    value = from_json_text(turn.get("tool_calls"))
    if not is_held(value):
        value = [from_json_text(turn.get("function_call"))]
    if not isinstance(value, list):
        raise Unusable(BAD_CALLS, f"they are {value!r:.60}")
    return [_call(item) for item in value]


def _call(item: Any) -> Record:
    call = from_json_text(item)
    inner = call.get("function") if isinstance(call, dict) else None
    function = inner if isinstance(inner, dict) else call
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise Unusable(BAD_CALLS, f"one is {item!r:.60}")
    arguments = next((function[key] for key in _ARGUMENTS if key in function), None)
    # Templates write arguments as JSON: as a text, they would be quoted once more.
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    function = {"name": name, "arguments": from_json_text({} if arguments is None else arguments)}
    return {**known, "type": "function", "function": function}


def tools_of(record: Record, is_row: bool) -> str:
    """Return as a JSON list what could be called, as templates take it; empty without any.

    Raises:
        Unusable: it has no form that is known.
    """
    beside: Record = {key: record.get(key) for key in TOOLS}
    if is_row:
        beside = _without_nulls(beside)
    found = [value for given in beside.values() if is_held(value := from_json_text(given))]
    if not found:
        return ""
    if any(other != found[0] for other in found):
        raise Unusable(BAD_TOOLS, "tools and functions differ")
    tools = [_tool(item) for item in (found[0] if isinstance(found[0], list) else found[:1])]
    return json.dumps(tools, ensure_ascii=False)


def _tool(item: Any) -> Record:
    tool = from_json_text(item)
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise Unusable(BAD_TOOLS, f"one is {item!r:.60}")
    if "parameters" not in tool and isinstance(schema := tool.get("input_schema"), dict):
        tool = {k: v for k, v in tool.items() if k != "input_schema"} | {"parameters": schema}
    return {"type": "function", "function": tool}


def from_json_text(value: Any) -> Any:
    """Decode a list or an object that stands in a text as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            inner = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return value
        return inner if isinstance(inner, list | dict) else value
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def check_one_text(turn: Record, role_of: Mapping[str, str]) -> None:
    """Refuse a turn that says in two keys who speaks, or what, and not the same.

    Raises:
        Unusable: which of them counts is not known.
    """
    names = [role_called(turn.get(key), role_of) for key in ("from", "role")]
    texts = [turn.get(key) for key in ("value", "content")]
    for (one, other), keys in ((names, "from and role"), (texts, "value and content")):
        if is_held(one) and is_held(other) and one != other:
            raise Unusable(TWO_TEXTS, keys)


def role_called(value: Any, role_of: Mapping[str, str] = ROLE_OF) -> Any:
    """Return the role that a name stands for; all else as it is."""
    if not isinstance(value, str):
        return value
    return role_of.get(value) or role_of.get(value.lower(), value)
