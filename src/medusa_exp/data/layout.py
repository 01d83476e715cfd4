"""Messages in; rendered text, and which of its characters are the assistant's own, out.

Where a reply stands is found by rendering, never by searching for its words: the conversation up to
an assistant turn is rendered once more with a word of ours in the reply's place. What stands before
that word and after it is the template's; the rest of the real text is the reply, however often the
same words occur elsewhere and whatever they look like.

Trained are the reply, as the template renders it, and the mark that ends its turn: what the
template writes after the reply up to its first special token, or, without one, up to trailing
blanks. Nothing else: no role header, no empty reasoning that the template adds, no line break after
the mark.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from medusa_exp.data.conversations import DataError, Message
from medusa_exp.data.template import Chat, ChatTemplate, Span, to_chat

_PROBE = "Zq7replyprobe7qZ"
"""Stands in for a message: no blanks to strip, no mark-up to take apart."""
_LOOKED_AT = 32
"""Conversations whose replies are compared with the generation prompt: most are treated alike."""


@dataclass(frozen=True)
class Layout:
    """A text of one training row, and the characters in it to train on, in order."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _Turn:
    """An assistant turn, and what the template writes around its reply."""

    index: int
    reply: str
    before: str | None
    """All text up to the reply; None where it is the beginning of the whole text."""
    start: int
    """Characters before the reply."""
    after: str
    """What ends the turn."""

    def follows_in(self, text: str) -> bool:
        """Does a text of the conversation up to this turn begin with what stands before it?"""
        return self.before is None or text.startswith(self.before)


def lay_out(messages: Sequence[Message], template: ChatTemplate) -> list[Layout]:
    """Render a conversation: as one text, or as one an assistant turn.

    One text, if every turn stands in it just as it does while it is the newest. Else (Qwen3 drops
    earlier reasoning, Phi-3 ends the whole with a mark of its own) each assistant turn gets the
    text that it is served with, and only that turn is trained in it.

    Where the template has {% generation %} tags, what they mark is trained too.

    Raises:
        DataError: the template refuses the conversation, or hides where a reply begins.
    """
    chat = to_chat(messages)
    [(whole, tags)] = template.render_tagged([chat])
    turns = _turns(chat, whole, template)
    with suppress(DataError):  # of a rendering that the conversation itself does not need
        _look_for_differences(chat, whole, turns, template)
    if all(_stands_in(whole, turn) for turn in turns):
        spans = [_span(turn, turn.start + len(turn.reply), template) for turn in turns]
        return [Layout(whole, _widened(spans, whole, tags, chat, turns, template))]
    return _turn_by_turn(chat, turns, whole, tags, template)


def _turns(chat: Chat, whole: str, template: ChatTemplate) -> list[_Turn]:
    """Return every assistant turn that the template shows."""
    turns = []
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        # One at a time: of a long conversation, all together would be the square of its length.
        [text] = template.render([[*chat[:i], {"role": "assistant", "content": _PROBE}]])
        before, found, after = text.rpartition(_PROBE)
        if found:
            kept = None if whole.startswith(before) else before
            turns.append(_Turn(i, message["content"], kept, len(before), after))
        else:
            template.note("the chat template leaves out some assistant turns")
    if not turns:
        raise DataError("the chat template shows no assistant turn.")
    return turns


def _stands_in(whole: str, turn: _Turn) -> bool:
    """Does the reply stand word for word in its frame in the whole text?

    Not asked of replies with blanks around them, where kept and stripped ones may look the same.
    """
    return (
        turn.before is None
        and turn.reply == turn.reply.strip()
        and whole.startswith(turn.reply, turn.start)
        and whole.startswith(turn.after, turn.start + len(turn.reply))
    )


def _turn_by_turn(
    chat: Chat, turns: list[_Turn], whole: str, tags: list[Span], template: ChatTemplate
) -> list[Layout]:
    """Locate each reply in the text that ends with it.

    Exact also where the template strips or edits replies, or where later turns change earlier ones.
    """
    shown, served, spans = [], [], []
    for turn in turns:
        [(text, own_tags)] = template.render_tagged([chat[: turn.index + 1]])
        if turn.index and not turn.reply.strip() and text == _upto(chat, turn, template):
            template.note("the chat template leaves out empty assistant turns")
            continue
        shown.append(turn)
        served.append((text, own_tags))
        spans.append(_reply_at_the_end(text, turn, chat, template))
    if not shown:
        raise DataError("the chat template shows no assistant turn.")
    if all(whole.startswith(text) for text, _ in served):
        return [Layout(whole, _widened(spans, whole, tags, chat, shown, template))]
    template.note(
        "the chat template renders a turn differently once others follow it: every assistant turn "
        "becomes a row of its own, as it is served"
    )
    return [
        Layout(text, _widened([span], text, own_tags, chat, [turn], template))
        for turn, span, (text, own_tags) in zip(shown, spans, served, strict=True)
    ]


def _upto(chat: Chat, turn: _Turn, template: ChatTemplate) -> str | None:
    try:
        return template.render([chat[: turn.index]])[0]
    except DataError:  # such a conversation cannot end there: then the turn is not left out
        return None


def _reply_at_the_end(text: str, turn: _Turn, chat: Chat, template: ChatTemplate) -> Span:
    """Locate the newest reply in a text that nothing follows."""
    if text.endswith(turn.after):
        start, end = _span(turn, len(text) - len(turn.after), template)
    else:  # whatever ends it now is the mark: the first of its last special tokens
        marks = [
            m for m in template.mark.finditer(text) if not template.has_words(text[m.start() :])
        ]
        start, end = turn.start, marks[0].end() if marks else len(text.rstrip())
    if turn.follows_in(text) and start <= end:
        return start, end
    # The template took the reply apart (reasoning): all that follows the prompt is the reply.
    prompt = _prompt(chat, turn, template)
    if text.startswith(prompt) and len(prompt) <= end:
        return len(prompt), end
    raise DataError(
        f"the chat template renders turn {turn.index} so that it does not begin with its prompt; "
        "where the reply starts cannot be told."
    )


def _prompt(chat: Chat, turn: _Turn, template: ChatTemplate) -> str:
    """Return what the turn is served after; nothing for a turn that comes first."""
    if not turn.index:
        return ""
    return template.render([chat[: turn.index]], add_generation_prompt=True)[0]


def _span(turn: _Turn, reply_end: int, template: ChatTemplate) -> Span:
    """Return from the reply's start to the end of the mark, for a reply that ends there."""
    mark = template.mark.search(turn.after)
    return turn.start, reply_end + (mark.end() if mark else len(turn.after.rstrip()))


def _widened(
    spans: list[Span],
    text: str,
    tags: list[Span],
    chat: Chat,
    turns: list[_Turn],
    template: ChatTemplate,
) -> list[Span]:
    """Widen spans to what generation tags mark, if there is a tag for each reply.

    A reply's tag begins between the turn's prompt and the reply, and ends among its end marks.
    """
    if not template.is_tagged:
        return spans
    wider = []
    for turn, (start, end) in zip(turns, spans, strict=True):
        prompt = _prompt(chat, turn, template)
        own = [
            (first, max(end, last))
            for first, last in tags
            if min(len(prompt), start) <= first <= start
            and not template.has_words(text[min(end, last) : max(end, last)])
        ]
        wider += own if len(own) == 1 else []
    if len(wider) == len(spans):
        return wider
    template.note(
        "the chat template's generation tags do not mark each reply: they are ignored, and replies "
        "are trained where they were found"
    )
    return spans


def _look_for_differences(
    chat: Chat, whole: str, turns: list[_Turn], template: ChatTemplate
) -> None:
    """Note where training differs from serving: in what stands before a reply, in what is said."""
    turn = turns[0]
    if turn.index and template.looked_at["prompt"] < _LOOKED_AT:
        prompt = _prompt(chat, turn, template)
        template.looked_at["prompt"] += 1
        if not (whole if turn.before is None else turn.before).startswith(prompt):
            template.note(
                "replies do not follow the generation prompt that the chat template is served with"
                + _ending(prompt, chat[turn.index - 1]["content"])
            )
    for role in ("system", "tool"):
        place = next((i for i, message in enumerate(chat) if message["role"] == role), None)
        if place is not None and not template.looked_at[role]:
            probed = [*chat[:place], {"role": role, "content": _PROBE}, *chat[place + 1 :]]
            [text] = template.render([probed])
            template.looked_at[role] += 1
            if _PROBE not in text:
                template.note(f"the chat template leaves out what the {role} says")


def _ending(prompt: str, newest: str) -> str:
    """Quote what the template writes behind the newest message: no words of the conversation."""
    _, found, ending = prompt.rpartition(newest)
    return f" (it ends in {ending!r})" if newest and found else ""
