"""A question and its answer, each a text or a list of messages, as the turns of a chat."""

from math import isfinite
from typing import Any

from medusa_exp.data.records import Chat, check_alike, columns_in, system_in
from medusa_exp.data.transcripts import prompt_in, transcript_in
from medusa_exp.data.turn_lists import (
    LISTS,
    Record,
    flat,
    get,
    is_alternation,
    is_turn,
    listed,
    names_a_turn,
    turns_of,
)
from medusa_exp.data.turns import ROLE_OF, Unusable, decoded, is_held

NO_ROOM = "a context beside messages, in none of which it has a place"
NOT_A_CONTEXT = "a context that is not text"
BAD_HISTORY = "a history that is no list of turns"
SEVERAL_ANSWERS = "several answers to one question"
REPLIES = ("completion", "response", "output", "answer")
ASKED = ("prompt", "question", "query", "instruction", "input")
CONTEXTS = ("input", "context")


def pair(
    record: Any, asked: tuple[str, ...], replied: tuple[str, ...], contexts: tuple[str, ...] = ()
) -> Chat | None:
    """Read a question and its answer, each a text or a list of messages."""
    asks = [key for key in asked if get(record, key) is not None]
    replies = [key for key in replied if key in record] if asks else []
    if not replies or isinstance(decoded(record[asks[0]]), dict):
        return None
    given = [key for key in replies if record[key] is not None] or replies
    reply = record[given[0]]
    if isinstance(reply, dict) and not is_turn(reply):
        return None
    beside = (*contexts, "history")
    check_alike(record, asks, columns_in(record, f"user: KEY, assistant: {given[0]}", beside))
    check_alike(record, given, columns_in(record, f"user: {asks[0]}, assistant: KEY", beside))
    is_chat = any(is_held(record.get(key)) for key in LISTS)  # a number beside it is its mark
    replies = answered(reply if is_chat else as_text(reply))
    return Chat(joined(record, asks[0], contexts, replies), system_in(record))


def answer_beside(record: Record, asked: str) -> tuple[str | None, list[Any]]:
    """Return the key of the answer to messages that end with a question, and its turns.

    The messages stand under the key `asked`. The answer is a text, or an assistant's turn.
    """
    found: Record = {}
    for key in (*REPLIES, "choices"):
        said = listed(record.get(key))
        if key == "choices" and isinstance(said, list):
            said = [get(choice, "message") for choice in said]
        turns = [said] if isinstance(said, dict) else said
        if isinstance(turns, list) and len(turns) == 1 and is_reply(turns[0]):
            found[key] = turns
        elif isinstance(text := record.get(key), str) and text.strip() and key in REPLIES:
            found[key] = text  # which may be JSON of another kind
    if not found:
        return None, []
    check_alike(record, [*found], columns_in(record, f"user: {asked}, assistant: KEY"))
    key, value = next(iter(found.items()))
    return key, answered(value)


def answered(reply: Any) -> list[Any]:
    """Return the turns of an answer; a list of texts is no chat where the question is apart."""
    reply = listed(reply) if isinstance(reply, list) else reply
    if is_alternation(reply):
        raise Unusable(SEVERAL_ANSWERS, f"they are {len(reply)}, the first {reply[0]!r:.60}")
    return said_by(reply, "assistant")


def joined(record: Record, asked: str, contexts: tuple[str, ...], replies: list[Any]) -> list[Any]:
    """Return earlier turns, the question with what belongs to it, and the answer."""
    turns = said_by(record[asked], "user")
    beside = [record.get(key) for key in contexts if key != asked]
    for text in beside:
        if not isinstance(text, str) and text:
            raise Unusable(NOT_A_CONTEXT, f"it is {text!r:.60}")
        if text and text.strip():
            if (content := _content(turns[-1])) is None:
                raise Unusable(NO_ROOM)
            turns[-1] = {**turns[-1], "content": f"{content}\n\n{text}"}
    if prompt_in(record[asked]) and (said := _content(replies[0])) is not None:
        replies = [{**replies[0], "content": said.strip()}, *replies[1:]]
    earlier = turns_of(history := record.get("history"))
    if earlier is None and is_held(history):
        raise Unusable(BAD_HISTORY, f"it is {history!r:.60}")
    return [*(earlier or []), *turns, *replies]


def as_text(value: Any) -> Any:
    """Return a number as text; all else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and isfinite(value) else value


def _content(turn: Any) -> str | None:
    content = turn.get("content") if isinstance(turn, dict) else None
    return content if isinstance(content, str) else None


def said_by(value: Any, role: str) -> list[Any]:
    """Return the turns of a list of messages or of a text, which may be a whole transcript."""
    is_parts = isinstance(value, list) and any(map(_is_part, value))
    of_messages = is_turn(value) or (isinstance(value, list) and not is_parts)
    if isinstance(value, str) and not isinstance(inner := decoded(value), str):
        of_messages = is_turn(flat(inner[0] if isinstance(inner, list) and inner else inner))
    in_text = prompt_in if role == "user" else transcript_in
    turns = turns_of(value) if of_messages else in_text(value)
    return turns or [{"role": role, "content": value}]


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "type" in value and not names_a_turn(flat(value))


def is_reply(turn: Any) -> bool:
    role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and ROLE_OF.get(role.lower()) == "assistant"
