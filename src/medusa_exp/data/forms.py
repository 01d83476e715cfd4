"""The forms that raw chats have: by which keys each is known, and how it becomes a list of turns.

`FORMS` is the table, a row and a function a form. A function returns None where a record does not
have its form. Turns are as `parsing` reads them: objects of a role (`from`) and a content
(`value`); what is wrong with one of them is found there.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medusa_exp.data.trees import best_branch, longest_branch
from medusa_exp.data.turns import (
    PICTURES,
    ROLE_OF,
    TOOLS,
    USED,
    Unusable,
    decoded,
    fields_of,
    first_held,
    is_held,
    is_switched_on,
    reasoning_of,
    role_called,
    texts_of,
)

NO_WINNER = "two conversations without a winner"
NO_ROOM = "a context beside messages, in none of which it has a place"
NOT_A_CONTEXT = "a context that is not text"
BAD_HISTORY = "a history that is no list of turns"
BAD_SYSTEM = "a system text in an unknown form"
SEVERAL_ANSWERS = "several answers to one question"
BOTH_BAD = "two conversations, both marked as bad"

Record = dict[str, Any]

IDS = (
    "id",
    "custom_id",
    "conversation_id",
    "conversation_hash",
    "message_tree_id",
    "prompt_id",
    "uuid",
)
SYSTEMS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
_REPLIES = ("completion", "response", "output", "answer")
_ASKED = ("prompt", "question", "query", "instruction", "input")
_CONTEXTS = ("input", "context")
_TALKS = ("conversation", "chat_messages", "dialog", "dialogue")
LISTS = ("conversations", "messages", *_TALKS, "contents", "conversation_a", "conversation_b")
"""Keys of lists of turns, and of nothing else."""
_WRAPPERS = ("body", "params", "request")
SPEAKERS = ("sender", "speaker", "author")
WORDS = ("parts", "text", "utterance")
WHO, WHAT = ("from", "role", *SPEAKERS), ("value", "content", *WORDS)
"""Keys of a turn, the first of which counts."""
_PAIRS = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot"),
}
"""Names of roles that are keys of texts themselves."""
ROLE_KEYS = ("system", *_PAIRS["user"], *_PAIRS["assistant"])


class Ambiguous(Exception):
    """A raw chat that may be read in several ways; its text says in which."""


@dataclass(frozen=True)
class Chat:
    """A raw chat as turns, with the system text that stood beside them."""

    turns: list[Any]
    system: Any = None
    tools_in: Record = field(default_factory=dict)
    """The record within the record that they stand in, with what else holds for all of it."""


@dataclass(frozen=True)
class Form:
    """A row of the table."""

    keys: tuple[str, ...]
    """What it reads of a record, but for ids and system texts."""
    read: Callable[[Any], Chat | None]


def _messages(record: Any) -> Chat | None:
    """Read ShareGPT's `conversations`, OpenAI's `messages`; either may be JSON in a text."""
    if not isinstance(record, dict):
        return None
    values = [decoded(record.get(key)) for key in ("conversations", "messages")]
    lists = [turns for turns in values if isinstance(turns, list)]
    if not lists:
        return None
    system = _system(record)
    _check_same_talk({"conversations": values[0], "messages": values[1]}, system)
    return Chat(_turns(lists[0] or lists[-1]) or [], system, record)


def _conversation(record: Any) -> Chat | None:
    """Read a chat log's `conversation`."""
    talks = {key: decoded(_get(record, key)) for key in _TALKS}
    found = [talk for talk in talks.values() if isinstance(talk, list)]
    if not found:
        return None
    system = _system(record)
    _check_same_talk(talks, system)
    return Chat(_turns(found[0]) or [], system)


def _prompt(record: Any) -> Chat | None:
    """Read `prompt` and `completion`, texts or lists of messages."""
    return _pair(record, ("prompt",), _REPLIES)


def _instruction(record: Any) -> Chat | None:
    """Read `instruction`, `input` or `context`, and `output` or `response`."""
    return _pair(record, ("instruction",), _REPLIES, _CONTEXTS)


def _question(record: Any) -> Chat | None:
    """Read `question` (`query`), perhaps a `context`, and `answer` or `response`."""
    return _pair(record, ("question", "query"), _REPLIES, ("context",))


def _input(record: Any) -> Chat | None:
    """Read `input` and `output`: the former belongs to an `instruction` where there is one."""
    if _get(record, "instruction") is not None:
        return None
    return _pair(record, ("input",), _REPLIES)


def _user(record: Any) -> Chat | None:
    """Read `user` (`human`) and `assistant`."""
    return _pair(record, _PAIRS["user"], _PAIRS["assistant"])


def _chosen(record: Any) -> Chat | None:
    """Read the preferred answer of a pair, after its prompt, or messages, if not a whole chat."""
    chosen = _get(record, "chosen")
    if chosen is None:
        return None
    replies = _said(chosen, "assistant")
    asked = [key for key in _ASKED if _get(record, key) is not None]
    if not _is_reply(replies[0]):
        return Chat(replies, _system(record))
    if not asked:
        before = _messages(record)
        if before is None or not before.turns or _is_reply(before.turns[-1]):
            return None
        return Chat([*before.turns, *replies], before.system)
    if asked != ["instruction", "input"]:
        _check_alike(record, asked)
    return Chat(_joined(record, asked[0], _CONTEXTS, replies), _system(record))


def _contents(record: Any) -> Chat | None:
    """Read Gemini's `contents`: `parts` of text, in the roles user and model."""
    contents = decoded(_get(record, "contents"))
    if not (isinstance(contents, list) and contents and isinstance(contents[0], dict)):
        return None
    turns = [{"role": "user", **turn} if isinstance(turn, dict) else turn for turn in contents]
    return Chat(_turns(turns) or [], _system(record), record)


def _body(record: Any) -> Chat | None:
    """Read the `messages` (`contents`) in a batch request's `body`, `params` or `request`."""
    for key in _WRAPPERS:
        inner = decoded(_get(record, key))
        if isinstance(inner, dict) and (chat := _messages(inner) or _contents(inner)):
            return chat
    return None


def _winner(record: Any) -> Chat | None:
    """Read which of `conversation_a` and `conversation_b` won; the first if none did."""
    both = [_turns(_get(record, f"conversation_{side}")) for side in "ab"]
    if both[0] is None or both[1] is None:
        return None
    winner = str(_get(record, "winner") or "").lower()
    if "bad" in winner:
        raise Unusable(BOTH_BAD)
    if winner not in ("model_a", "model_b", "a", "b") and "tie" not in winner:
        raise Unusable(NO_WINNER, f"its winner is {winner!r}, not model_a, model_b or tie")
    return Chat(both[winner.endswith("b")], _system(record))  # type: ignore[arg-type]


def _mapping(record: Any) -> Chat | None:
    """Read the longest branch of an exported chat's `mapping`."""
    mapping = decoded(_get(record, "mapping"))
    if not isinstance(mapping, dict):
        return None
    messages = longest_branch(mapping, _get(record, "current_node"))
    return Chat(_turns([_of_export(message) for message in messages]) or [])


def _of_export(message: Record) -> Record:
    author, content = message.get("author"), message.get("content")
    role = author.get("role") if isinstance(author, dict) else author
    parts = content.get("parts") if isinstance(content, dict) else content
    if role == "assistant" and message.get("recipient") not in (None, "all"):
        # What it says is another's input, in a form of its own.
        return {"role": role, "content": parts, "tool_calls": [message.get("recipient")]}
    return {"role": role, "content": content if parts is None else parts}


def _replies(record: Any) -> Chat | None:
    """Read the best ranked, else the longest, branch of a tree of `replies`."""
    root = decoded(_get(record, "prompt"))
    if not (isinstance(root, dict) and isinstance(root.get("replies"), list)):
        return None
    return Chat(_turns(best_branch(root)) or [])


def _data(record: Any) -> Chat | None:
    """Read a list of texts, the user's and the assistant's in turn."""
    data = decoded(_get(record, "data"))
    return Chat(_turns(data) or []) if _is_alternation(data) else None


def _text(record: Any) -> Chat | None:
    """Read one text in which "Human:" and "Assistant:" stand before what they say."""
    turns = _transcript(_get(record, "text"))
    return Chat(turns, _system(record)) if turns else None


def _list(record: Any) -> Chat | None:
    """Read a list of messages without a record around it."""
    turns = _turns(record) if isinstance(record, list) else None
    return Chat(turns) if turns else None


FORMS = {
    "messages": Form(("conversations", "messages"), _messages),
    "conversation": Form(_TALKS, _conversation),
    "prompt": Form(("prompt", *_REPLIES, "history"), _prompt),
    "instruction": Form(("instruction", *_CONTEXTS, *_REPLIES, "history"), _instruction),
    "question": Form(("question", "query", "context", *_REPLIES, "history"), _question),
    "input": Form(("input", *_REPLIES, "history"), _input),
    "user": Form((*_PAIRS["user"], *_PAIRS["assistant"], "history"), _user),
    "chosen": Form(("chosen", *_ASKED, *_CONTEXTS, "conversations", "messages"), _chosen),
    "contents": Form(("contents",), _contents),
    "body": Form(_WRAPPERS, _body),
    "winner": Form(("conversation_a", "conversation_b", "winner"), _winner),
    "mapping": Form(("mapping", "current_node"), _mapping),
    "replies": Form(("prompt",), _replies),
    "data": Form(("data",), _data),
    "text": Form(("text",), _text),
    "list": Form((), _list),
}
"""Name, as `dataset.form` has it -> form."""


def by_columns(columns: Mapping[str, str]) -> Form:
    """Return the form that `dataset.columns` describes: roles, or messages -> key of a record.

    A key may be a path into a record, its parts joined by dots (`answers.text.0`).
    """

    def read(record: Any) -> Chat | None:
        found = {role: _at(record, path) for role, path in columns.items()}
        if "messages" in columns:
            turns = _turns(found["messages"])
            return Chat(turns, found.get("system")) if turns else None
        if found["assistant"] is None or ("user" in columns and found["user"] is None):
            return None
        asked = _said(found["user"], "user") if "user" in columns else []
        return Chat([*asked, *_answered(found["assistant"])], found.get("system"))

    paths = columns.values()
    return Form((*paths, *(path.partition(".")[0] for path in paths)), read)


def columns_of(forms: Mapping[str, Form]) -> tuple[str, ...]:
    """Return the keys that are read of a record in one of these forms."""
    keys = [key for form in forms.values() for key in form.keys]
    return tuple(dict.fromkeys([*keys, *IDS, *SYSTEMS, *TOOLS, *PICTURES]))


def id_in(record: Any) -> Any:
    """Return what a record calls itself, or None."""
    return next((record[key] for key in IDS if _get(record, key) not in (None, "")), None)


def is_turn(value: Any) -> bool:
    """Tell a message that stands for itself from a record."""
    if not isinstance(value, dict):
        return False
    of_turns = {"from", "role", "value", "content", "name", *USED, *SPEAKERS, *WORDS}
    named = value.keys() & {"from", "role", *SPEAKERS}
    said = value.keys() & {"value", "content", *WORDS}
    return bool(named and said) and value.keys() <= of_turns


def _get(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


def _at(record: Any, path: str) -> Any:
    """Follow a path into a record; a key that has the dots itself comes first."""
    if (value := _get(record, path)) is not None:
        return value
    first, dot, rest = path.partition(".")
    if isinstance(record, list) and first.isdigit() and int(first) < len(record):
        inner = record[int(first)]
    else:
        inner = decoded(_get(record, first))
    return _at(inner, rest) if dot else inner


def _system(record: Any) -> Any:
    """Return the system text beside the turns."""
    said = [key for key in SYSTEMS if is_held(_get(record, key))]
    _check_alike(record, said)
    value = record[said[0]] if said else _get(record, "system")
    inner = decoded(value)
    if not (isinstance(inner, dict) and is_held(inner)):
        return None if isinstance(inner, dict) else value
    found = first_held(inner, ("parts", "content", "text", "value"))
    if found is None:
        raise Unusable(BAD_SYSTEM, f"its keys are {', '.join(map(str, inner))}")
    return bare(found)


def _turns(value: Any) -> list[Any] | None:
    """Return the turns of a list of them, or of a single one; None for all else."""
    value = decoded(value)
    if is_turn(value):
        value = [value]
    if not isinstance(value, list) or not value:
        return None
    if _is_alternation(value):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(value)]
    return [turn for item in value for turn in _usual(item)]


def _is_alternation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)


def _usual(item: Any) -> list[Any]:
    """Return turns of role and content of an item that says both in other words."""
    if isinstance(item, list) and _is_alternation(item) and len(item) == 2:
        return [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
    if not isinstance(item, dict):
        return [item]
    if item.keys() & {"value", "content"} and item.keys() & {"from", "role"}:
        return [item]
    role, said = first_held(item, WHO), first_held(item, WHAT)
    if role is not None and said is not None:
        return [{**item, "role": role, "content": bare(said)}]
    names = [key for key, value in item.items() if value is not None and key in ROLE_KEYS]
    if role is None and names:
        # What stands beside the texts is looked at in each turn: it may be of any.
        beside = {key: value for key, value in item.items() if key not in ROLE_KEYS}
        return [{**beside, "role": key, "content": item[key]} for key in names]
    return [item]


def _check_same_talk(talks: Record, system: Any) -> None:
    """Refuse a record with two lists of turns, unless they say the same: the first would count."""
    held = {key: turns for key, turns in talks.items() if isinstance(turns, list) and turns}
    said = [_said_in(turns, system) for turns in held.values()] if len(held) > 1 else []
    if any(one != said[0] for one in said):
        raise Ambiguous(f"the keys {' and '.join(held)}")


def _said_in(turns: list[Any], system: Any) -> list[Any]:
    """Return all that turns say, after the system text beside them, which one list may repeat."""
    found = [_all_said(turn) for turn in _turns(turns) or []]
    before = [_all_said({"role": "system", "content": system})] if is_held(system) else []
    return found if found[:1] == before else before + found


def _all_said(turn: Any) -> Any:
    """Return what is read of a turn, in whatever form it stands there."""
    if not isinstance(turn, dict):
        return turn
    role, said = role_called(first_held(turn, ("from", "role"))), first_held(turn, WHAT)
    try:
        thought, said = texts_of(bare(said))
    except Unusable:
        thought = ""
    if role != "assistant":
        return role, said, fields_of(turn, role, is_row=True)
    of_assistant = (reasoning_of(turn) or thought, is_switched_on(turn))
    return role, said, fields_of(turn, role, is_row=True), *of_assistant


def bare(parts: Any) -> Any:
    """Return parts, as a list has them, with the bare text of those that have nothing else."""
    if not isinstance(parts, list):
        return parts
    return [
        part["text"] if isinstance(part, dict) and part.keys() == {"text"} else part
        for part in parts
    ]


def _pair(
    record: Any, asked: tuple[str, ...], replied: tuple[str, ...], contexts: tuple[str, ...] = ()
) -> Chat | None:
    """Read a question and its answer, each a text or a list of messages."""
    asks = [key for key in asked if _get(record, key) is not None]
    replies = [key for key in replied if key in record] if asks else []
    if not replies or isinstance(decoded(record[asks[0]]), dict):
        return None
    given = [key for key in replies if record[key] is not None] or replies
    reply = record[given[0]]
    if isinstance(reply, dict) and not is_turn(reply):
        return None
    _check_alike(record, asks)
    _check_alike(record, given)
    replies = _answered(reply)
    return Chat(_joined(record, asks[0], contexts, replies), _system(record))


def _answered(reply: Any) -> list[Any]:
    """Return the turns of an answer; a list of texts is no chat where the question is apart."""
    if _is_alternation(reply):
        raise Unusable(SEVERAL_ANSWERS, f"they are {len(reply)}, the first {reply[0]!r:.60}")
    return _said(reply, "assistant")


def _check_alike(record: Record, keys: list[str]) -> None:
    """Refuse a record in which several keys may be meant, unless they hold the same."""
    if len(keys) > 1 and any(record[key] != record[keys[0]] for key in keys):
        raise Ambiguous(f"the keys {' and '.join(keys)}")


def _joined(record: Record, asked: str, contexts: tuple[str, ...], replies: list[Any]) -> list[Any]:
    """Return earlier turns, the question with what belongs to it, and the answer."""
    turns = _said(record[asked], "user")
    beside = [record.get(key) for key in contexts if key != asked]
    for text in beside:
        if not isinstance(text, str) and text:
            raise Unusable(NOT_A_CONTEXT, f"it is {text!r:.60}")
        if text and text.strip():
            if (content := _content(turns[-1])) is None:
                raise Unusable(NO_ROOM)
            turns[-1] = {**turns[-1], "content": f"{content}\n\n{text}"}
    if _transcript(record[asked]) and (said := _content(replies[0])) is not None:
        replies = [{**replies[0], "content": said.strip()}, *replies[1:]]
    earlier = _turns(history := record.get("history"))
    if earlier is None and is_held(history):
        raise Unusable(BAD_HISTORY, f"it is {history!r:.60}")
    return [*(earlier or []), *turns, *replies]


def _content(turn: Any) -> str | None:
    content = turn.get("content") if isinstance(turn, dict) else None
    return content if isinstance(content, str) else None


def _said(value: Any, role: str) -> list[Any]:
    """Return the turns of a list of messages or of a text, which may be a whole transcript."""
    is_parts = isinstance(value, list) and any(isinstance(v, dict) and "type" in v for v in value)
    of_messages = is_turn(value) or (isinstance(value, list) and not is_parts)
    if isinstance(value, str) and not isinstance(inner := decoded(value), str):
        of_messages = is_turn(inner[0] if isinstance(inner, list) and inner else inner)
    turns = _turns(value) if of_messages else _transcript(value)
    return turns or [{"role": role, "content": value}]


def _is_reply(turn: Any) -> bool:
    role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and ROLE_OF.get(role.lower()) == "assistant"


_TRANSCRIPTS = (
    re.compile(r"(?:\A|\n\n)[ \n]*(Human|Assistant):"),
    re.compile(r"\s*###\s*(Human|Assistant):"),
)


def _transcript(text: Any) -> list[Any]:
    """Return the turns of a text that begins with "Human:" or "### Human:", else none."""
    if not isinstance(text, str) or not text[:100].lstrip().startswith(("Human:", "###")):
        return []
    for marks in _TRANSCRIPTS:
        pieces = marks.split(text)
        if pieces[0].strip() or pieces[1:2] != ["Human"]:
            continue
        said = zip(pieces[1::2], pieces[2::2], strict=True)
        turns = [{"role": who.lower(), "content": words.strip()} for who, words in said]
        return turns if turns[-1]["content"] else turns[:-1]  # where the answer is to follow
    return []
