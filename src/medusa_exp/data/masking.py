"""A conversation and a tokenizer in; token ids and what to train on out.

The text is rendered once and tokenised once, and characters decide: `layout.py` says which of them
are the assistant's. Token lengths are never added up: tokenising pieces apart gives other
tokens than tokenising the whole.

A token is trained when its last character is. So a token that reaches across the edge of a reply
belongs to where it ends: the blank before a reply goes with the reply's first word, as it does when
the model says it. The pieces of one character (byte fallback) all have that character's place and
share its fate, and a token without any width is trained if it stands behind a reply's first
character. Blanks that a special token takes along (Phi-3's marks do) are not the token's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.layout import Layout, lay_out
from medusa_exp.data.template import ChatTemplate


@dataclass(frozen=True)
class Rendered:
    """One training sequence of length T."""

    text: str
    input_ids: list[int]
    is_trained: list[bool]
    """Per token: is it the assistant's own output?"""
    is_cut: bool = False
    """Was it longer than a limit?"""
    num_cut_off: int = 0
    """Trained tokens that the cut has cost."""


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """Render with the tokenizer's chat template: one sequence, or one an assistant turn.

    `layout.lay_out` says when, and which characters are trained; this module's text says which
    tokens. A lone surrogate is rendered as U+FFFD.

    Raises:
        DataError: the template refuses the conversation, or hides where a reply begins.
    """
    [result] = Renderer(tokenizer).render_many([conversation])
    if isinstance(result, DataError):
        raise result
    return result


class Renderer:
    """`render` for many conversations: the template is prepared once, texts are tokenised
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
    ) -> list[list[Rendered] | DataError]:
        """Return each conversation's rows, or why it has none.

        Rows are as `render` gives them, but cut, so that one may be without a trained token. Where
        each turn is a row, those after the first such one are empty: they begin as it does.
        """
        results: list[list[Layout] | DataError] = []
        for conversation in conversations:
            try:
                results.append(lay_out(conversation.messages, self.template))
            except DataError as error:
                results.append(DataError(f"conversation {conversation.id}: {error}"))
        # Conversations of several rows have each row's text again in the next: one by one.
        single = [r[0] for r in results if isinstance(r, list) and len(r) == 1]
        rows = iter(self._tokenise(single))
        return [
            r if isinstance(r, DataError) else [next(rows)] if len(r) == 1 else self._one_by_one(r)
            for r in results
        ]

    def _one_by_one(self, layouts: list[Layout]) -> list[Rendered]:
        rows: list[Rendered] = []
        is_beyond = False
        for layout in layouts:
            if is_beyond:  # without the work: a long conversation has its text again in every row
                rows.append(Rendered(layout.text, [], [], is_cut=True))
                continue
            rows += self._tokenise([layout])
            is_cut_off = self.max_length is not None and not any(rows[-1].is_trained)
            is_beyond = is_cut_off and self.tokenizer.truncation_side == "right"
        return rows

    def _tokenise(self, layouts: list[Layout]) -> list[Rendered]:
        if not layouts:
            return []
        encoded = self.tokenizer(
            [layout.text for layout in layouts],
            # The template has written every special token; adding them would double the BOS.
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # of length: that is this class's business
        )
        return [
            self._cut(Rendered(layout.text, ids, self._mask(layout, ids, encoding)))
            for layout, ids, encoding in zip(
                layouts, encoded.input_ids, encoded.encodings, strict=True
            )
        ]

    def _mask(self, layout: Layout, ids: list[int], encoding: Encoding) -> list[bool]:
        """Return per token whether its last character lies in a span."""
        if self._swallowing and not self._swallowing.keys().isdisjoint(ids):
            return _by_ends(layout, self._own_ends(layout.text, ids, encoding))
        is_trained = [False] * len(ids)
        for start, stop in layout.spans:
            # The token of the character at which a span begins, or which follows it, is the first
            # whose last character lies there, or behind: this needs no list of offsets.
            first = encoding.char_to_token(start)
            end = encoding.char_to_token(stop) if stop < len(layout.text) else len(ids)
            if first is None or end is None:  # in no token: trimmed, or normalised away
                return _by_ends(layout, [end for _, end in encoding.offsets])
            is_trained[first:end] = [True] * (end - first)
        return is_trained

    def _own_ends(self, text: str, ids: list[int], encoding: Encoding) -> list[int]:
        """Return where each token ends, without the blanks that some take along."""
        return [
            self._own_end(text, i, start, end) if i in self._swallowing else end
            for i, (start, end) in zip(ids, encoding.offsets, strict=True)
        ]

    def _own_end(self, text: str, token: int, start: int, end: int) -> int:
        content = self._swallowing[token]
        found = text.find(content, start, end)
        if found >= 0:
            return found + len(content)
        return start + len(text[start:end].rstrip())  # normalised, it reads otherwise in the text

    def _cut(self, row: Rendered) -> Rendered:
        limit = self.max_length
        if limit is None or len(row.input_ids) <= limit:
            return row
        ids, mask = row.input_ids, row.is_trained
        if self.tokenizer.truncation_side == "right":
            kept_ids, kept_mask = ids[:limit], mask[:limit]
        else:
            keep = int(ids[0] == self.tokenizer.bos_token_id)
            tail = len(ids) - (limit - keep)
            kept_ids, kept_mask = ids[:keep] + ids[tail:], mask[:keep] + mask[tail:]
        return Rendered(row.text, kept_ids, kept_mask, True, sum(mask) - sum(kept_mask))


def _by_ends(layout: Layout, ends: list[int]) -> list[bool]:
    ends_T = np.array(ends, dtype=np.int64)
    starts, stops = np.array(layout.spans).T
    last_begun_T = np.searchsorted(starts, ends_T, side="left") - 1
    return ((last_begun_T >= 0) & (ends_T <= stops[last_begun_T])).tolist()
