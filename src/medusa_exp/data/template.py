"""Render messages with a tokenizer's chat template, just as the model is served with it."""

import copy
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from medusa_exp.data.faults import DataError
from medusa_exp.data.messages import Message
from medusa_exp.data.raw_chats import whole_letters
from medusa_exp.data.turns import REASONING

log = logging.getLogger(__name__)

REFUSED = "refused by the chat template"
"""Why a conversation, or a prompt, is left out of which the template raises an error."""
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]
"""First character, and the one after the last."""
Chat = list[dict[str, Any]]
"""Messages as templates take them."""


def to_chat(messages: Sequence[Message]) -> Chat:
    """Return messages for a template; half of a surrogate pair, which is no text, as U+FFFD."""
    return [_to_turn(message) for message in messages]


def _to_turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": whole_letters(message.content)}
    if message.reasoning:
        # Each template has its word for it.
        turn |= dict.fromkeys(REASONING, whole_letters(message.reasoning))
    if message.fields:
        turn |= json.loads(whole_letters(message.fields))
    return turn


class ChatTemplate:
    """Renders chats, and knows the special tokens that may end a turn.

    A text starts with BOS exactly once wherever the tokenizer puts BOS before texts: mostly the
    template writes it; where it does not, it is put in front here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare a tokenizer's template.

        Raises:
            DataError: as `check_chat_template`.
        """
        check_chat_template(tokenizer, tokenizer.name_or_path or "memory")
        self.source = tokenizer.get_chat_template()
        self.is_tagged = bool(_GENERATION_TAG.search(self.source))
        """Does it mark what the assistant says with {% generation %}?"""
        self.bos = _bos_before_texts(tokenizer)
        self._variables = tokenizer.special_tokens_map
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        marks = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.mark = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        """Matches any special token."""
        self.notes: set[str] = set()
        """What was met that users should know about this template."""
        self.looked_at: Counter[str] = Counter()
        """How often `masking` has looked for a difference, by what it looked at."""
        if "strftime_now" in self.source:
            self.note("the chat template writes the date of the rendering into every text")

    def with_tools(self, tools: str) -> "ChatTemplate":
        """Return the same with what can be called, a JSON list; notes are shared."""
        if not tools:
            return self
        other = copy.copy(self)
        other._variables = {**self._variables, "tools": json.loads(whole_letters(tools))}
        return other

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the assistant is to speak.

        Raises:
            DataError: the template refuses these messages.
        """
        [text] = self.render([to_chat(messages)], add_generation_prompt=True)
        return text

    def render(self, chats: Sequence[Chat], add_generation_prompt: bool = False) -> list[str]:
        """Return the text of each chat.

        Raises:
            DataError: the template refuses one of them; its own words.
        """
        return [text for text, _ in self.render_tagged(chats, add_generation_prompt)]

    def has_words(self, text: str) -> bool:
        """Is there more in a text than blanks and special tokens?"""
        return bool(self.mark.sub("", text).strip())

    def note(self, what: str) -> None:
        """Log what users should know about this template, the first time it is met."""
        if what not in self.notes:
            self.notes.add(what)
            log.warning("data: %s", what)

    def render_tagged(
        self, chats: Sequence[Chat], add_generation_prompt: bool = False
    ) -> list[tuple[str, list[Span]]]:
        """Return the text of each chat and what generation tags mark in it: nothing without tags.

        Raises:
            DataError: as `render`.
        """
        try:
            texts, tags = render_jinja_template(
                list(chats),
                chat_template=self.source,
                return_assistant_tokens_mask=self.is_tagged,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template is somebody's program: it raises what it likes
            reason = str(error) or type(error).__name__
            raise DataError(f"the chat template says: {reason}") from error
        marked = tags if self.is_tagged else [[] for _ in texts]
        return [
            self._with_bos(chat, text, spans)
            for chat, text, spans in zip(chats, texts, marked, strict=True)
        ]

    def _with_bos(self, chat: Chat, text: str, tags: list[Span]) -> tuple[str, list[Span]]:
        if text.lstrip().startswith(self.bos) and not self._is_quoted_bos(chat):
            return text, tags
        shift = len(self.bos)
        return self.bos + text, [(start + shift, stop + shift) for start, stop in tags]

    def _is_quoted_bos(self, chat: Chat) -> bool:
        """Is a BOS in front somebody's word, and not the template's?"""
        if not self.bos or not chat or not chat[0]["content"].lstrip().startswith(self.bos):
            return False
        probed = [{**chat[0], "content": "x"}, *chat[1:]]
        [text], _ = render_jinja_template([probed], chat_template=self.source, **self._variables)
        return not text.lstrip().startswith(self.bos)


def _bos_before_texts(tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer("").input_ids
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def describe(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return all of a tokenizer that decides how a chat becomes tokens: for the key of a cache."""
    bos = _bos_before_texts(tokenizer)  # and no padding or truncation of an earlier call is left
    source = tokenizer.get_chat_template()
    return [
        bos,
        date.today().isoformat() if "strftime_now" in source else "",
        source,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        sorted((i, t.content, t.special) for i, t in tokenizer.added_tokens_decoder.items()),
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.truncation_side,
    ]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Look whether a tokenizer can render chats.

    Raises:
        DataError: it cannot; says what is missing, and what to do.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {place} has no character offsets: use a "
            "fast one, which has a tokenizer.json."
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {place} has no chat template. Put a chat_template.jinja there "
            "(the form that the model was trained with), or set tokenizer.path to a tokenizer "
            "that has one."
        )
