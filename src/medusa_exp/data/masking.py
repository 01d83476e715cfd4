"""Which characters of a rendered conversation are the assistant's own.

Where a reply stands is found by rendering, never by searching for its words: the conversation up to
an assistant turn is rendered once more with a word of ours in the reply's place. What stands before
that word and after it is the template's; the rest of the real text is the reply, however often the
same words occur elsewhere and whatever they look like.

Trained are the reply, as the template renders it, and the mark that ends its turn: what the
template writes after the reply up to its first special token, or, without one, up to trailing
blanks. Nothing else: no role header, no empty reasoning that the template adds, no line break after
the mark.

A reply with reasoning or tool calls is all that follows the prompt that it is served after. Which
tokens that are: `rendering.py`.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from medusa_exp.data.faults import DataError
from medusa_exp.data.messages import Conversation, Message
from medusa_exp.data.template import Chat, ChatTemplate, Span, to_chat
from medusa_exp.data.turns import REASONING

_PROBE = "Zq7replyprobe7qZ"
"""Stands in for a message: no blanks to strip, no mark-up to take apart."""
_LOOKED_AT = 32
"""Conversations whose replies are compared with the generation prompt: most are treated alike."""
_ONE_BY_ONE = 32
"""Assistant turns of a conversation that are each rendered as the newest; of those behind them,
ever fewer are, for that takes the square of their number."""

# What a template may leave out, as summary.json and messages name it.
NO_REASONING = "reasoning that the chat template leaves out"
NO_TOOLS = "tools that the chat template leaves out"

Reach = Callable[[str], int]
"""How many characters of a text may lie within a limit of tokens: EVERYTHING where all do."""
EVERYTHING = 1 << 62


@dataclass(frozen=True)
class MaskedText:
    """The rendered text of one example, and the characters in it to train on, in order."""

    text: str
    spans: list[Span]
    left_out: frozenset[str] = frozenset()
    """What the template writes nothing of: `NO_REASONING`, `NO_TOOLS`."""


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
    has_more: bool
    """Does the template write reasoning or tool calls with the reply?"""
    is_trained: bool
    is_beyond: bool
    """Does it begin where the limit is?"""

    @property
    def is_said(self) -> bool:
        """Is there something to train?"""
        return self.is_trained and (self.has_more or bool(self.reply.strip()))


@dataclass
class _Rendered:
    """A conversation, and the whole text of it."""

    messages: Sequence[Message]
    chat: Chat
    template: ChatTemplate
    reach: Reach
    whole: str
    tags: list[Span]
    end: int
    """What the limit reaches of the whole text."""
    left_out: set[str] = field(default_factory=set)

    @property
    def replies(self) -> list[int]:
        """Return the places of the assistant's turns."""
        return [i for i, message in enumerate(self.chat) if message["role"] == "assistant"]

    def turn(self, i: int, before: str | None, start: int, after: str, has_more: bool) -> _Turn:
        """Return an assistant turn that was found there."""
        reply, is_trained = self.chat[i]["content"], self.messages[i].is_trained
        is_beyond = start >= (self.end if before is None else self.reach(before))
        return _Turn(i, reply, before, start, after, has_more, is_trained, is_beyond)

    def upto(self, i: int, *newest: dict[str, Any]) -> str:
        """Return the text of what stands before a turn, and of one that may take its place."""
        return self.template.render([[*self.chat[:i], *newest]])[0]

    def prompt(self, turn: _Turn) -> str:
        """Return what a turn is served after; nothing for a turn that comes first."""
        if not turn.index:
            return ""
        return self.template.render([self.chat[: turn.index]], add_generation_prompt=True)[0]

    def span(self, turn: _Turn, reply_end: int) -> Span:
        """Return from a reply's start to the end of the mark, for a reply that ends there."""
        mark = self.template.mark.search(turn.after)
        return turn.start, reply_end + (mark.end() if mark else len(turn.after.rstrip()))

    def stands(self, turn: _Turn) -> bool:
        """Does the reply stand word for word in its frame in the whole text?

        Not asked of replies with blanks around them, where kept and stripped ones may look alike.
        """
        return (
            turn.before is None
            and not turn.has_more
            and turn.reply == turn.reply.strip()
            and self.whole.startswith(turn.reply, turn.start)
            and self.whole.startswith(turn.after, turn.start + len(turn.reply))
        )


def mask_text(conversation: Conversation, template: ChatTemplate, reach: Reach) -> list[MaskedText]:
    """Render a conversation: as one text, or as one an assistant turn.

    One text, if every turn stands in it just as it does while it is the newest. Else (Qwen3 drops
    earlier reasoning, Phi-3 ends the whole with a mark of its own) each assistant turn gets the
    text that it is served with, and only that turn is trained in it.

    Where the template has {% generation %} tags, what they mark is trained too. Turns beyond what
    `reach` says are not looked at, once there is one to train: they neither decide nor are located.
    Where each is a text, those of the turns behind the first of them are empty.

    Raises:
        DataError: the template refuses the conversation, or hides where a reply begins.
    """
    plain, template = template, template.with_tools(conversation.tools)
    chat = to_chat(conversation.messages)
    [(whole, tags)] = template.render_tagged([chat])
    it = _Rendered(conversation.messages, chat, template, reach, whole, tags, reach(whole))
    if conversation.tools and _is_alike(it, plain):
        it.left_out.add(NO_TOOLS)
        template.note("the chat template leaves out which tools there are")
    turns, num_unseen = _turns(it)
    with suppress(DataError):  # of a rendering that the conversation itself does not need
        _look_for_differences(it, turns[0])
    deciding = [turn for turn in turns if not turn.is_beyond]
    if not any(turn.is_said for turn in deciding):
        deciding = turns
    if all(map(it.stands, deciding)):
        spans = [it.span(turn, turn.start + len(turn.reply)) for turn in deciding]
        return [_masked(it, whole, spans, tags, deciding)]
    return _turn_by_turn(it, deciding, turns[len(deciding) :], num_unseen)


def _is_alike(it: _Rendered, plain: ChatTemplate) -> bool:
    """Is the text the same by the template without tools?"""
    with suppress(DataError):  # calls may be refused where there is nothing to call
        return plain.render([it.chat]) == [it.whole]
    return False


def _masked(
    it: _Rendered, text: str, spans: list[Span], tags: list[Span], turns: list[_Turn]
) -> MaskedText:
    wider = _widened(it, text, spans, tags, turns)
    trained = [span for span, turn in zip(wider, turns, strict=True) if turn.is_trained]
    return MaskedText(text, trained, frozenset(it.left_out))


def _turns(it: _Rendered) -> tuple[list[_Turn], int]:
    """Return the assistant turns that the template shows, and how many are not looked at.

    All up to the first that lies beyond the limit, but at least one that is to be trained.
    """
    turns: list[_Turn] = []
    joined: dict[int, int] | None = None
    is_stable = True
    replies = it.replies
    for number, i in enumerate(replies):
        turn = None
        is_stable = is_stable and (not turns or turns[-1].before is None)
        is_one_of_many = number >= _ONE_BY_ONE and number & (number - 1) and i != replies[-1]
        if is_one_of_many and is_stable and turns:
            joined = _joined(it) if joined is None else joined
            turn = _like(it, i, joined, turns[-1])
        turn = turn or _probed(it, i)
        if turn is None:
            it.template.note("the chat template leaves out some assistant turns")
            continue
        turns.append(turn)
        if turn.is_beyond and any(turn.is_said for turn in turns):
            return turns, sum(it.messages[j].is_trained for j in replies[number + 1 :])
    if not turns:
        raise DataError("the chat template shows no assistant turn.")
    return turns, 0


def _probed(it: _Rendered, i: int) -> _Turn | None:
    """Find where a reply stands while it is the newest; None where the template hides it."""
    # One at a time: of a long conversation, all together would be the square of its length.
    text = it.upto(i, {"role": "assistant", "content": _PROBE})
    before, found, after = text.rpartition(_PROBE)
    if not found:
        return None
    kept = None if it.whole.startswith(before) else before
    return it.turn(i, kept, len(before), after, _has_more(it, i))


def _has_more(it: _Rendered, i: int) -> bool:
    """Does the template write reasoning or tool calls of a turn?

    Raises:
        DataError: it leaves out the calls, without which the turn would end too early.
    """
    turn = it.chat[i]
    thinks, calls = "reasoning_content" in turn, "tool_calls" in turn
    if thinks and not _is_written(it, i, REASONING):
        it.left_out.add(NO_REASONING)
        it.template.note("the chat template leaves out the assistant's reasoning")
        thinks = False
    if calls and not _is_written(it, i, ("tool_calls",)):
        raise DataError(f"the chat template leaves out the tool calls of turn {i}.")
    return thinks or calls


def _is_written(it: _Rendered, i: int, keys: Sequence[str]) -> bool:
    without = {key: value for key, value in it.chat[i].items() if key not in keys}
    with suppress(DataError):  # a turn may have to say something
        return it.upto(i, it.chat[i]) != it.upto(i, without)
    return True


def _joined(it: _Rendered) -> dict[int, int]:
    """Return where each reply begins in the whole text: nothing unless all stand word for word.

    Told from one rendering more, with a probe in each reply's place.
    """
    replies = it.replies
    probe = {"role": "assistant", "content": _PROBE}
    probed = [probe if message["role"] == "assistant" else message for message in it.chat]
    between = ""
    with suppress(DataError):
        [between] = it.template.render([probed])
    pieces = between.split(_PROBE)
    if len(pieces) != len(replies) + 1:
        return {}
    starts, place = {}, 0
    for i, piece in zip(replies, pieces, strict=False):
        if not it.whole.startswith(piece, place):
            return {}
        starts[i] = place + len(piece)
        place = starts[i] + len(it.chat[i]["content"])
        if not it.whole.startswith(it.chat[i]["content"], starts[i]):
            return {}
    return starts if it.whole[place:] == pieces[-1] else {}


def _like(it: _Rendered, i: int, starts: dict[int, int], earlier: _Turn) -> _Turn | None:
    """Return a turn that stands in the whole text as an earlier one does, or None."""
    if i not in starts or it.chat[i].keys() != {"role", "content"}:
        return None
    turn = it.turn(i, None, starts[i], earlier.after, False)
    return turn if not earlier.has_more and it.stands(turn) else None


def _turn_by_turn(
    it: _Rendered, deciding: list[_Turn], others: list[_Turn], num_unseen: int
) -> list[MaskedText]:
    """Locate each reply in the text that ends with it.

    Exact also where the template strips or edits replies, or where later turns change earlier ones.
    `others` lie beyond the limit, and `num_unseen` behind them.
    """
    served = [found for turn in deciding if (found := _served(it, turn)) is not None]
    if not served:
        raise DataError("the chat template shows no assistant turn.")
    if all(it.whole.startswith(text) for _, text, _, _ in served):
        spans, turns = [span for *_, span in served], [turn for turn, *_ in served]
        return [_masked(it, it.whole, spans, it.tags, turns)]
    it.template.note(
        "the chat template renders a turn differently once others follow it: every assistant turn "
        "becomes a row of its own, as it is served"
    )
    served += [found for turn in others if (found := _served(it, turn)) is not None]
    rows = [
        _masked(it, text, [span], tags, [turn])
        for turn, text, tags, span in served
        if turn.is_trained
    ]
    rows += [MaskedText("", [])] * num_unseen
    return rows or [MaskedText(it.whole, [], frozenset(it.left_out))]


def _served(it: _Rendered, turn: _Turn) -> tuple[_Turn, str, list[Span], Span] | None:
    """Return the text that ends with a turn, and what is the reply's in it; None without any."""
    template = it.template
    if turn.index > 2 * _ONE_BY_ONE and not template.is_tagged and it.stands(turn):
        end = turn.start + len(turn.reply)
        return turn, it.whole[: end + len(turn.after)], [], it.span(turn, end)
    [(text, tags)] = template.render_tagged([it.chat[: turn.index + 1]])
    if turn.index and not turn.reply.strip():
        with suppress(DataError):  # such a conversation cannot end there: the turn is not left out
            if text == it.upto(turn.index):
                template.note("the chat template leaves out empty assistant turns")
                return None
    return turn, text, tags, _reply_at_the_end(it, text, turn)


def _reply_at_the_end(it: _Rendered, text: str, turn: _Turn) -> Span:
    """Locate the newest reply in a text that nothing follows."""
    template = it.template
    if text.endswith(turn.after):
        start, end = it.span(turn, len(text) - len(turn.after))
    else:  # whatever ends it now is the mark: the first of its last special tokens
        marks = [
            m for m in template.mark.finditer(text) if not template.has_words(text[m.start() :])
        ]
        start, end = turn.start, marks[0].end() if marks else len(text.rstrip())
    is_after = start <= end and (turn.before is None or text.startswith(turn.before))
    # Reasoning and calls may stand on either side of the reply, and where the template takes a
    # reply apart, it is not found: all that follows the prompt is the reply then.
    if turn.has_more or not is_after:
        with suppress(DataError) if is_after else nullcontext():
            prompt = it.prompt(turn)
            if text.startswith(prompt) and len(prompt) <= end:
                return len(prompt), end
    if is_after:
        return start, end
    raise DataError(
        f"the chat template renders turn {turn.index} so that it does not begin with its prompt; "
        "where the reply starts cannot be told."
    )


def _widened(
    it: _Rendered, text: str, spans: list[Span], tags: list[Span], turns: list[_Turn]
) -> list[Span]:
    """Widen spans to what generation tags mark, if there is a tag for each reply.

    A reply's tag begins between the turn's prompt and the reply, and ends among its end marks.
    """
    if not it.template.is_tagged:
        return spans
    wider: list[Span] = []
    for number, (turn, (start, end)) in enumerate(zip(turns, spans, strict=True)):
        # The end of the reply before is as much as to say, and needs no rendering.
        is_rendered = number < _ONE_BY_ONE
        least = min(len(it.prompt(turn)), start) if is_rendered else spans[number - 1][1]
        around = tags[bisect_left(tags, (least, 0)) : bisect_left(tags, (start + 1, 0))]
        own = [
            (first, max(end, last))
            for first, last in around
            if not it.template.has_words(text[min(end, last) : max(end, last)])
        ]
        wider += own if len(own) == 1 else []
    if len(wider) == len(spans):
        return wider
    it.template.note(
        "the chat template's generation tags do not mark each reply: they are ignored, and replies "
        "are trained where they were found"
    )
    return spans


def _look_for_differences(it: _Rendered, turn: _Turn) -> None:
    """Note where training differs from serving: in what stands before a reply, in what is said."""
    chat, template = it.chat, it.template
    if turn.index and template.looked_at["prompt"] < _LOOKED_AT:
        prompt = it.prompt(turn)
        template.looked_at["prompt"] += 1
        if not (it.whole if turn.before is None else turn.before).startswith(prompt):
            template.note(
                "replies do not follow the generation prompt that the chat template is served with"
                + _ending(prompt, chat[turn.index - 1]["content"])
            )
    for role in ("system", "tool"):
        place = next((i for i, message in enumerate(chat) if message["role"] == role), None)
        if place is not None and not template.looked_at[role]:
            probe = {**chat[place], "content": _PROBE}
            [text] = template.render([[*chat[:place], probe, *chat[place + 1 :]]])
            template.looked_at[role] += 1
            if _PROBE not in text:
                template.note(f"the chat template leaves out what the {role} says")


def _ending(prompt: str, newest: str) -> str:
    """Quote what the template writes behind the newest message: no words of the conversation."""
    _, found, ending = prompt.rpartition(newest)
    return f" (it ends in {ending!r})" if newest and found else ""
