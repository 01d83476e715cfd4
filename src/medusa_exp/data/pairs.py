"""A question and its answer, each a text or a list of messages, as the turns of a chat."""

import re
from math import isfinite
from typing import Any

from medusa_exp.data.records import Chat, all_said, check_alike, columns_in, system_in
from medusa_exp.data.transcripts import prompt_in, transcript_in
from medusa_exp.data.turn_lists import (
    LISTS,
    flat,
    get,
    is_alternation,
    is_turn,
    listed,
    names_a_turn,
    role_in,
    turns_of,
)
from medusa_exp.data.turns import (
    ROLES,
    WHO,
    Record,
    Unusable,
    first_filled,
    from_json_text,
    is_held,
    role_called,
)

NO_ROOM = "a context beside messages, in none of which it has a place"
NOT_A_CONTEXT = "a context that is not text"
BAD_HISTORY = "a history that is no list of turns"
SEVERAL_ANSWERS = "several answers to one question"
ONLY_A_CHOICE = "an answer that only names one of its choices"
CHOICES = ("choices", "options")
"""Keys of what may be answered, beside a question."""
_MARK = re.compile(r"\(?([A-Za-z]|\d{1,2})[).]?")
REPLIES = ("completion", "response", "output", "answer")
ASKED = ("prompt", "question", "query", "instruction", "input")
CONTEXTS = ("input", "context")


def pair(
    record: Any, asked: tuple[str, ...], replied: tuple[str, ...], contexts: tuple[str, ...] = ()
) -> Chat | None:
    """Read a question and its answer, each a text or a list of messages."""
    asks = [key for key in asked if get(record, key) is not None]
    replies = [key for key in replied if key in record] if asks else []
    if not replies or _is_tree(record[asks[0]]):
        return None
    given = [key for key in replies if record[key] is not None] or replies
    reply = record[given[0]]
    if isinstance(reply, dict) and not is_turn(reply):
        return None
    beside = (*contexts, "history")
    check_alike(record, asks, columns_in(record, f"user: KEY, assistant: {given[0]}", beside))
    check_alike(record, given, columns_in(record, f"user: {asks[0]}, assistant: KEY", beside))
    _refuse_choice(record, reply)
    is_chat = any(is_held(record.get(key)) for key in LISTS)  # a number beside it is its mark
    replies = answered(reply if is_chat else as_text(reply))
    return Chat(joined(record, asks[0], contexts, replies), system_in(record))


def _refuse_choice(record: Record, reply: Any) -> None:
    """Refuse an answer that means nothing without the choices beside the question.

    Raises:
        Unusable: it is the number or the letter of one.
    """
    mark = _MARK.fullmatch(str(reply).strip()) if isinstance(reply, str | int) else None
    for key in CHOICES if mark else ():
        choices = from_json_text(record.get(key))
        if mark and _is_mark_of(mark[1].lower(), choices) and reply not in _said_by_each(choices):
            raise Unusable(ONLY_A_CHOICE, f"it is {mark[0]!r}: write what that of {key} says")


def _is_mark_of(mark: str, choices: Any) -> bool:
    """Is it the key of one of several choices, or its place, from 0, 1 or A?"""
    said = _said_by_each(choices)
    is_of_settings = isinstance(choices, dict) and not all(isinstance(v, str | list) for v in said)
    if is_of_settings or len(said) < 2:  # such as a temperature; of numbers, the keys are the marks
        return isinstance(choices, dict) and mark in map(str.lower, choices)
    return (int(mark) if mark.isdigit() else ord(mark) - ord("a") + 1) <= len(said)


def _said_by_each(choices: Any) -> list[Any]:
    """Return choices of a list, of an object of their marks, or of the columns of a table."""
    if isinstance(choices, dict):
        texts = choices.get("text")
        return texts if isinstance(texts, list) else [*choices.values()]
    return choices if isinstance(choices, list) else []


def _is_tree(asked: Any) -> bool:
    """Is it no question, but an object, as of a tree of `replies`? A text may be any other JSON."""
    root = from_json_text(asked)
    return isinstance(root, dict) and (root is asked or isinstance(root.get("replies"), list))


def answer_beside(record: Record, asked: str) -> tuple[str | None, list[Any]]:
    """Return the key of the answer to messages that end with a question, and its turns.

    The messages stand under the key `asked`. The answer is a text, or an assistant's turn.
    """
    found: Record = {}
    for key in REPLIES:
        said = listed(record.get(key))
        turns = turns_of([said] if isinstance(said, dict) else said) or []
        if _is_reply(turns):
            found[key] = answered(turns)
        elif isinstance(text := record.get(key), str) and text.strip():
            found[key] = answered(text)  # which may be JSON of another kind
    choices = from_json_text(record.get("choices"))
    said = [get(choice, "message") for choice in choices] if isinstance(choices, list) else None
    if _is_reply(turns := turns_of(said) or []):
        found["choices.0.message"] = answered(turns)
    if not found:
        return None, []
    check_alike(found, [*found], columns_in(record, f"user: {asked}, assistant: KEY"))
    path, turns = next(iter(found.items()))
    return path.partition(".")[0], turns


def _is_reply(turns: list[Any]) -> bool:
    return len(turns) == 1 and role_in(turns[0]) == "assistant"


def answered(reply: Any) -> list[Any]:
    """Return the turns of an answer; a list of texts is no chat where the question is apart."""
    reply = listed(reply) if isinstance(reply, list) else reply
    if is_alternation(reply):
        raise Unusable(SEVERAL_ANSWERS, f"they are {len(reply)}, the first {reply[0]!r:.60}")
    return said_by(reply, "assistant")


def joined(record: Record, asked: str, contexts: tuple[str, ...], replies: list[Any]) -> list[Any]:
    """Return earlier turns, the question with what belongs to it, and the answer.

    A system text of the question's comes first. What the earlier turns or the answer say of the
    question again is left out.
    """
    turns = said_by(record[asked], "user")
    earlier = turns_of(history := record.get("history"))
    if earlier is None and is_held(history):
        raise Unusable(BAD_HISTORY, f"it is {history!r:.60}")
    if earlier and role_in(earlier[-1]) == "user" and _say_the_same(earlier[-1:], turns[-1:]):
        earlier = earlier[:-1]
    replies = without_question(after(record[asked], replies), turns)
    beside = [record.get(key) for key in contexts if key != asked]
    for text in beside:
        if not isinstance(text, str) and text:
            raise Unusable(NOT_A_CONTEXT, f"it is {text!r:.60}")
        if text and text.strip():
            if (content := _content(turns[-1])) is None:
                raise Unusable(NO_ROOM)
            turns[-1] = {**turns[-1], "content": f"{content}\n\n{text}"}
    if role_in(turns[0]) == "system" and earlier:
        if role_in(earlier[0]) != "system":
            return [turns[0], *earlier, *turns[1:], *replies]
        turns = turns[1:] if _say_the_same(turns[:1], earlier[:1]) else turns
    return [*(earlier or []), *turns, *replies]


def without_question(replies: list[Any], asked: list[Any]) -> list[Any]:
    """Return the turns of an answer, which may be a whole chat that begins with the question's."""
    if asked and role_in(asked[0]) == "system" != role_in(replies[0]):
        asked = asked[1:]
    num_asked = len(asked) if len(asked) < len(replies) else 0
    return replies[num_asked:] if _say_the_same(replies[:num_asked], asked) else replies


def _say_the_same(turns: list[Any], others: list[Any]) -> bool:
    return [*map(all_said, turns)] == [*map(all_said, others)]


def after(asked: Any, replies: list[Any]) -> list[Any]:
    """Return the turns of an answer; after a transcript without the space that stood before it."""
    if not prompt_in(asked) or (said := _content(replies[0])) is None:
        return replies
    return [{**replies[0], "content": said.strip()}, *replies[1:]]


def as_text(value: Any) -> Any:
    """Return a number as text; all else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and isfinite(value) else value


def _content(turn: Any) -> str | None:
    content = turn.get("content") if isinstance(turn, dict) else None
    return content if isinstance(content, str) else None


def said_by(value: Any, role: str) -> list[Any]:
    """Return the turns of a list of messages or of a text, which may be a whole transcript."""
    in_text = prompt_in if role == "user" else transcript_in
    turns = turns_of(value) if _is_of_messages(value) else in_text(value)
    return turns or [{"role": role, "content": value}]


def _is_of_messages(value: Any) -> bool:
    """Is it messages, and not a text, of which JSON may be the words, or parts of one?"""
    if isinstance(value, list):
        return not any(map(_is_part, value))
    inner = from_json_text(value)
    if isinstance(inner, list) and inner:
        first = flat(inner[0])
        is_of_role = names_a_turn(first) and role_called(first_filled(first, WHO)) in ROLES
        return is_of_role or is_turn(first)
    return is_turn(inner)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "type" in value and not names_a_turn(flat(value))
