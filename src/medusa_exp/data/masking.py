"""Which characters of a rendered conversation, and which of its tokens, are the assistant's own.

Where a reply stands is found by rendering, never by searching for its words: the conversation up to
an assistant turn is rendered once more with a word of ours in the reply's place. What stands before
that word and after it is the template's; the rest of the real text is the reply, however often the
same words occur elsewhere and whatever they look like.

Trained are the reply, as the template renders it, and the mark that ends its turn: what the
template writes after the reply up to its first special token, or, without one, up to trailing
blanks. Nothing else: no role header, no empty reasoning that the template adds, no line break after
the mark.

The text is tokenized once, and a token is trained when its last character is. Token lengths are
never added up: tokenizing pieces apart gives other tokens than tokenizing the whole. So a token
that reaches across the edge of a reply belongs to where it ends: the blank before a reply goes with
the reply's first word, as it does when the model says it. The pieces of one character (byte
fallback) all have that character's place and share its fate, and a token without any width is
trained if it stands behind a reply's first character. Blanks that a special token takes along
(Phi-3's marks do) are not the token's own.

T tokens of a text.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.conversations import Conversation, DataError, Message
from medusa_exp.data.template import Chat, ChatTemplate, Span, to_chat

_PROBE = "Zq7replyprobe7qZ"
"""Stands in for a message: no blanks to strip, no mark-up to take apart."""
_LOOKED_AT = 32
"""Conversations whose replies are compared with the generation prompt: most are treated alike."""


@dataclass(frozen=True)
class MaskedText:
    """The rendered text of one example, and the characters in it to train on, in order."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class MaskedTokens:
    """One training sequence of length T."""

    text: str
    input_ids: list[int]
    is_trained: list[bool]
    """Per token: is it the assistant's own output?"""
    is_cut: bool = False
    """Was it longer than a limit?"""
    num_cut_off: int = 0
    """Trained tokens that the cut has cost."""
    num_needed: int = 0
    """The limit at which one trained token would be left, where the cut has cost them all."""


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


def mask_text(messages: Sequence[Message], template: ChatTemplate) -> list[MaskedText]:
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
        return [MaskedText(whole, _widened(spans, whole, tags, chat, turns, template))]
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
) -> list[MaskedText]:
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
        return [MaskedText(whole, _widened(spans, whole, tags, chat, shown, template))]
    template.note(
        "the chat template renders a turn differently once others follow it: every assistant turn "
        "becomes a row of its own, as it is served"
    )
    return [
        MaskedText(text, _widened([span], text, own_tags, chat, [turn], template))
        for turn, span, (text, own_tags) in zip(shown, spans, served, strict=True)
    ]


def _upto(chat: Chat, turn: _Turn, template: ChatTemplate) -> str | None:
    with suppress(DataError):  # such a conversation cannot end there: the turn is not left out
        return template.render([chat[: turn.index]])[0]
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
    is_after = turn.before is None or text.startswith(turn.before)
    if is_after and start <= end:
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


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[MaskedTokens]:
    """Render with the tokenizer's chat template: one sequence, or one an assistant turn.

    `mask_text` says when. A lone surrogate is rendered as U+FFFD.

    Raises:
        DataError: the template refuses the conversation, or hides where a reply begins.
    """
    [result] = Renderer(tokenizer).render_many([conversation])
    if isinstance(result, DataError):
        raise result
    return result


class Renderer:
    """`render` for many conversations: the template is prepared once, texts are tokenized
    together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        """Prepare a tokenizer's template.

        Args:
            tokenizer: a fast one, with a chat template.
            max_length: rows are cut to so many whole tokens, on the tokenizer's truncation side; a
                BOS stays in front.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.max_length = max_length
        added = tokenizer.added_tokens_decoder
        self._swallowing = {i: token.content for i, token in added.items() if token.rstrip}
        """Tokens that take the blanks behind them along, and are not meant to own them."""

    def render_many(
        self, conversations: Iterable[Conversation]
    ) -> list[list[MaskedTokens] | DataError]:
        """Return each conversation's rows, or why it has none.

        Rows are as `render` gives them, but cut, so that one may be without a trained token. Where
        each turn is a row, those after the first such one are empty: they begin as it does.
        """
        results: list[list[MaskedText] | DataError] = []
        for conversation in conversations:
            try:
                results.append(mask_text(conversation.messages, self.template))
            except DataError as error:
                results.append(DataError(f"{conversation.described()}: {error}"))
        # Conversations of several rows have each row's text again in the next: one by one.
        single = [r[0] for r in results if isinstance(r, list) and len(r) == 1]
        rows = iter(self._tokenize(single))
        return [
            r if isinstance(r, DataError) else [next(rows)] if len(r) == 1 else self._one_by_one(r)
            for r in results
        ]

    def _one_by_one(self, texts: list[MaskedText]) -> list[MaskedTokens]:
        rows: list[MaskedTokens] = []
        is_beyond = False
        for masked in texts:
            if is_beyond:  # without the work: a long conversation has its text again in every row
                rows.append(MaskedTokens(masked.text, [], [], is_cut=True))
                continue
            rows += self._tokenize([masked])
            is_cut_off = self.max_length is not None and not any(rows[-1].is_trained)
            is_beyond = is_cut_off and self.tokenizer.truncation_side == "right"
        return rows

    def _tokenize(self, texts: list[MaskedText]) -> list[MaskedTokens]:
        if not texts:
            return []
        encoded = self.tokenizer(
            [masked.text for masked in texts],
            # The template has written every special token; adding them would double the BOS.
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # of length: that is this class's business
        )
        return [
            self._cut(MaskedTokens(masked.text, ids, self._mask(masked, ids, encoding)))
            for masked, ids, encoding in zip(
                texts, encoded.input_ids, encoded.encodings, strict=True
            )
        ]

    def _mask(self, masked: MaskedText, ids: list[int], encoding: Encoding) -> list[bool]:
        """Return per token whether its last character lies in a span."""
        if self._swallowing and not self._swallowing.keys().isdisjoint(ids):
            tokens = zip(ids, encoding.offsets, strict=True)
            return _by_ends(masked, [self._own_end(masked.text, i, *at) for i, at in tokens])
        is_trained = [False] * len(ids)
        for start, stop in masked.spans:
            # The token of the character at which a span begins, or which follows it, is the first
            # whose last character lies there, or behind: this needs no list of offsets.
            first = encoding.char_to_token(start)
            end = encoding.char_to_token(stop) if stop < len(masked.text) else len(ids)
            if first is None or end is None:  # in no token: trimmed, or normalized away
                return _by_ends(masked, [end for _, end in encoding.offsets])
            is_trained[first:end] = [True] * (end - first)
        return is_trained

    def _own_end(self, text: str, token: int, start: int, end: int) -> int:
        """Return where a token ends, without the blanks that some take along."""
        content = self._swallowing.get(token)
        if content is None:
            return end
        found = text.find(content, start, end)
        if found >= 0:
            return found + len(content)
        return start + len(text[start:end].rstrip())  # normalized, it reads otherwise in the text

    def _cut(self, row: MaskedTokens) -> MaskedTokens:
        limit = self.max_length
        if limit is None or len(row.input_ids) <= limit:
            return row
        ids, mask = row.input_ids, row.is_trained
        if self.tokenizer.truncation_side == "right":
            kept_ids, kept_mask = ids[:limit], mask[:limit]
            needed = mask.index(True) + 1 if any(mask) else 0
        else:
            keep = int(ids[0] == self.tokenizer.bos_token_id)
            tail = len(ids) - (limit - keep)
            kept_ids, kept_mask = ids[:keep] + ids[tail:], mask[:keep] + mask[tail:]
            needed = keep + mask[::-1].index(True) + 1 if any(mask) else 0
        num_cut_off = sum(mask) - sum(kept_mask)
        needed = 0 if any(kept_mask) else needed
        return MaskedTokens(row.text, kept_ids, kept_mask, True, num_cut_off, needed)


def _by_ends(masked: MaskedText, ends: list[int]) -> list[bool]:
    ends_T = np.array(ends, dtype=np.int64)
    starts, stops = np.array(masked.spans).T
    last_begun_T = np.searchsorted(starts, ends_T, side="left") - 1
    return ((last_begun_T >= 0) & (ends_T <= stops[last_begun_T])).tolist()
