"""A conversation and a tokenizer in; token ids and what to train on out.

The text is rendered once and tokenised once, and characters decide: `layout.py` says which of them
are the assistant's. Token lengths are never added up: tokenising pieces apart gives other
tokens than tokenising the whole.

A token is trained when its last character is. So a token that reaches across the edge of a reply
belongs to where it ends: the blank before a reply goes with the reply's first word, as it does when
the model says it. The pieces of one character (byte fallback) all have that character's place and
share its fate, and a token without any width is trained if it stands behind a reply's first
character.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)

    def render_many(
        self, conversations: Iterable[Conversation]
    ) -> list[list[Rendered] | DataError]:
        """Return each conversation's rows, or why it has none."""
        results: list[list[Layout] | DataError] = []
        for conversation in conversations:
            try:
                results.append(lay_out(conversation.messages, self.template))
            except DataError as error:
                results.append(DataError(f"conversation {conversation.id}: {error}"))
        rows = iter(self._tokenise([row for r in results if isinstance(r, list) for row in r]))
        return [r if isinstance(r, DataError) else [next(rows) for _ in r] for r in results]

    def _tokenise(self, layouts: list[Layout]) -> list[Rendered]:
        if not layouts:
            return []
        encoded = self.tokenizer(
            [layout.text for layout in layouts],
            # The template has written every special token; adding them would double the BOS.
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # the caller cuts to its own length limit, and counts what it cut
        )
        return [
            Rendered(layout.text, ids, _is_trained(layout, offsets))
            for layout, ids, offsets in zip(
                layouts, encoded.input_ids, encoded.offset_mapping, strict=True
            )
        ]


def _is_trained(layout: Layout, offsets: list[tuple[int, int]]) -> list[bool]:
    """Return per token whether its last character lies in a span."""
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    if not layout.spans:
        return [False] * len(offsets)
    starts, stops = np.array(layout.spans).T
    last_begun = np.searchsorted(starts, ends, side="left") - 1
    return ((last_begun >= 0) & (ends <= stops[last_begun])).tolist()


def check_chat_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raise a DataError that says what is missing, for tokenizers that cannot render chats."""
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {place} has no character offsets (tokenizer.json).")
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {place} has no chat template. Put a chat_template.jinja there "
            "(the form that the model was trained with), or set tokenizer.path to a tokenizer "
            "that has one."
        )
