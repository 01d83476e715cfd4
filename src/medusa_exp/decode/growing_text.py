"""The text of tokens that come a few at a time, as it is shown while a model answers."""

from transformers import PreTrainedTokenizerBase

_MOST, _KEPT = 128, 32
"""Tokens that are decoded at each step, and how many of them are kept when there are more."""

_HALF = "\ufffd"


class GrowingText:
    """Decodes tokens as they come: the text of some is what the whole gains by them.

    A text depends on its neighbors: a space before a word, the bytes of one character. The whole
    would take longer from step to step (0.6 to 2 ms of 2,048 tokens, a third of a GPU's step), so
    that of a long answer only the end is decoded again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._recent: list[int] = []
        self._shown = ""
        """The text of `_recent`."""

    def add(self, tokens: list[int]) -> str:
        """Return what these add to the text; special tokens have none."""
        self._recent += tokens
        text = self._decoded(self._recent)
        complete = text.rstrip(_HALF)  # the rest of a character comes with the next step
        if complete != text and not complete.startswith(self._shown):
            # A line break that is a token of a byte is lost beside half of a character.
            return ""
        added = complete[len(self._shown) :]
        self._shown = complete
        if len(self._recent) > _MOST:
            end = self._recent[-_KEPT:]
            text = self._decoded(end).rstrip(_HALF)
            # Not so where it begins within a character, or has no text: then a step later.
            if text and self._shown.endswith(text):
                self._recent, self._shown = end, text
        return added

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
