"""What a chat is once it has been read: messages with roles, of which some can be trained."""

import hashlib

import msgspec

from medusa_exp.data.turns import NOT_TO_TRAIN, TWO_SYSTEMS, Unusable

NO_REPLY = "no assistant turn"
EMPTY_ANSWER = "a last answer without words"
EMPTY_QUESTION = "a question without words"


class Message(msgspec.Struct, frozen=True, gc=False):
    """One turn; role is one of `ROLES`. The content may hold lone surrogates."""

    role: str
    content: str
    reasoning: str = ""
    """What the assistant thought before it said that."""
    is_trained: bool = True
    """May the turn be trained, if it is the assistant's?"""
    fields: str = ""
    """Its tool calls, or the call that it answers: a JSON object, as templates read it."""


class Conversation(msgspec.Struct, frozen=True):
    """A chat with an id that stays the same from run to run."""

    id: str
    messages: list[Message]
    source: str = ""
    """The file, or the member of an archive, that it stands in."""
    number: int = 0
    """Its place there, from 1."""
    tools: str = ""
    """What the assistant could call: a JSON list, as templates read it."""

    def described(self) -> str:
        """Return what messages call it."""
        place = f" ({self.source}, record {self.number})" if self.number else ""
        return f"conversation {self.id}{place}"

    def digest(self) -> bytes:
        """Return 16 bytes that are the same for the same roles and contents, whatever the id."""
        digest = hashlib.sha256()
        for message in self.messages:
            digest.update(f"{message.role} {len(message.content)} ".encode())
            digest.update(message.content.encode("utf-8", "surrogatepass"))
            if message.reasoning or message.fields or not message.is_trained:
                more = [message.reasoning, message.fields, message.is_trained]
                digest.update(repr(more).encode("utf-8", "surrogatepass"))
        digest.update(self.tools.encode("utf-8", "surrogatepass"))
        return digest.digest()[:16]


def checked(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages, after the system text, if there is something to train on.

    Raises:
        Unusable: there is nothing, or two system texts that differ.
    """
    if system and not system.isspace():
        first = messages[0]
        if first.role != "system":
            messages = [Message("system", system), *messages]
        elif _is_blank(first.content):
            messages = [Message("system", system), *messages[1:]]
        elif first.content.strip() != system.strip():
            detail = f"{system!r:.40} beside the turns, and {first.content!r:.40} in them"
            raise Unusable(TWO_SYSTEMS, detail)
    is_asked = has_reply = False
    for message in messages:
        if message.role == "user" and not is_asked:
            is_asked = not _is_blank(message.content)
        if message.role == "assistant" and (not _is_blank(message.content) or message.fields):
            if message.is_trained:
                _check_both_speak(messages, is_asked)
                return messages
            has_reply = True
    raise Unusable(NOT_TO_TRAIN if has_reply else NO_REPLY)


def _check_both_speak(messages: list[Message], is_asked: bool) -> None:
    """Refuse an answer to no words, and a last one of none, which would be trained.

    Raises:
        Unusable: there is one.
    """
    last = messages[-1]
    is_silent = last.role == "assistant" and _is_blank(last.content) and last.is_trained
    if is_silent and not (last.fields or last.reasoning):
        raise Unusable(EMPTY_ANSWER)
    if is_asked:
        return
    asked = [message for message in messages if message.role == "user"]
    if asked and all(_is_blank(message.content) for message in asked):
        raise Unusable(EMPTY_QUESTION)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
