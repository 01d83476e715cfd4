"""Incremental detokenization: the text of tokens that come a few at a time."""

from transformers import PreTrainedTokenizerBase

_MOST, _KEPT = 128, 36
"""Beyond so many tokens all but the last so many are forgotten, once their text is certain.

What is kept must begin with a character, and end with one: of two, three or four tokens each, say.
"""
_REPLACEMENT = "\ufffd"
"""Stands for bytes that are not yet a whole character."""


class IncrementalDetokenizer:
    """Decodes tokens as they come: the text of some is what the whole text gains by them.

    A text depends on its neighbors: a space before a word, the bytes of one character. Decoding the
    whole at each step would take longer and longer (about 1 ms for 2,048 tokens), so that of a long
    text only the end is decoded again.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skips_special = tokenizer, skip_special_tokens
        self._recent: list[int] = []
        self._shown = ""
        """The text of `_recent`."""

    def add(self, tokens: list[int]) -> str:
        """Return what these tokens add to the text; half of a character comes with its rest."""
        self._recent += tokens
        text = self._decoded(self._recent)
        complete = text.rstrip(_REPLACEMENT)
        if len(complete) < len(self._shown):
            # Beside half of a character, tokenizers with byte fallback decode the bytes before it,
            # a line break, as replacements too. What has been shown is not taken back.
            return ""
        added = complete[len(self._shown) :]
        self._shown = complete
        if len(self._recent) > _MOST:
            end = self._recent[-_KEPT:]
            text = self._decoded(end).rstrip(_REPLACEMENT)
            # Where the end begins within a character or has no text, the next step tries again.
            if text and self._shown.endswith(text):
                self._recent, self._shown = end, text
        return added

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens,
            skip_special_tokens=self._skips_special,
            # It takes back a space before what follows: before "'", once "s" has come too.
            clean_up_tokenization_spaces=False,
        )
        return text
