"""Which tokens of a rendered conversation are the assistant's own, up to a limit of their number.

The text is tokenized once, and a token is trained when its last character is. Token lengths are
never added up: tokenizing pieces apart gives other tokens than tokenizing the whole. So a token
that reaches across the edge of a reply belongs to where it ends: the blank before a reply goes with
the reply's first word, as it does when the model says it. The pieces of one character (byte
fallback) all have that character's place and share its fate, and a token without any width is
trained if it stands behind a reply's first character. Blanks that a special token takes along
(Phi-3's marks do) are not the token's own.

T tokens of a text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from tokenizers import AddedToken, Encoding
from transformers import BatchEncoding, PreTrainedTokenizerBase

from medusa_exp.data.faults import DataError
from medusa_exp.data.masking import EVERYTHING, MaskedText, mask_text
from medusa_exp.data.messages import Conversation
from medusa_exp.data.template import ChatTemplate

_BETWEEN_WORDS = "(?<=[A-Za-z0-9])(?= [A-Za-z])"
_LEFT = (
    "a",
    "I",
    "don't",
    "x's",
    "12345",
    "a1",
    "B2B",
    "\n\nfoo",
    " . a",
    "\t\ta",
    "\u4f60a",
    "(a",
)
_RIGHT = (" b", " B 1", " words, and", " it's", " a\n", " x  ", " a\u4f60", " a" * 40)
"""Around a word's end, where splitters are tried."""
_LIKELY_CHARS = 8
"""Characters of a token in a text that is looked through for its limit: more than most have."""
_SOME_CHARS = 64
"""Characters of a reply that are tokens, whatever a normalizer leaves out."""


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
    """Trained tokens that the cut has cost.

    Where a text is far longer than the limit, only those that were looked at are counted.
    """
    num_needed: int = 0
    """The limit at which one trained token would be left, where the cut has cost them all."""
    left_out: frozenset[str] = frozenset()
    """What the template writes nothing of."""


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
        self._seams = Seams(tokenizer)
        self._reached = ("", EVERYTHING)

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
                results.append(mask_text(conversation, self.template, self._reach))
            except DataError as error:
                results.append(DataError(f"{conversation.described()}: {error}"))
        # Conversations of several rows have each row's text again in the next: one by one.
        single = [r[0] for r in results if isinstance(r, list) and len(r) == 1]
        rows = iter(self._tokenize(single))
        return [
            r if isinstance(r, DataError) else [next(rows)] if len(r) == 1 else self._one_by_one(r)
            for r in results
        ]

    def _reach(self, text: str) -> int:
        """Return how many characters the tokens within the limit, and one more, may cover."""
        limit = self.max_length
        is_cut_right = limit is not None and self.tokenizer.truncation_side == "right"
        if limit is None or not is_cut_right or len(text) <= _LIKELY_CHARS * limit:
            return EVERYTHING
        if self._reached[0] is text:
            return self._reached[1]
        found, size = EVERYTHING, _LIKELY_CHARS * limit
        while (place := self._seams.behind(text, size)) is not None:
            offsets = self._encode([text[:place]]).encodings[0].offsets
            if len(offsets) > limit:
                found = max(end for _, end in offsets[: limit + 1])
                break
            size = 2 * place
        self._reached = text, found
        return found

    def _shortened(self, masked: MaskedText) -> MaskedText:
        """Return the beginning of a text that has the tokens within the limit, and one more.

        And the first trained one, that the limit can be told which would do.
        """
        if not masked.spans or (end := self._reach(masked.text)) == EVERYTHING:
            return masked
        said = (span for span in masked.spans if masked.text[slice(*span)].strip())
        start, stop = next(said, masked.spans[0])
        place = self._seams.behind(masked.text, max(end, min(start + _SOME_CHARS, stop)))
        if place is None:
            return masked
        spans = [(start, min(stop, place)) for start, stop in masked.spans if start < place]
        return replace(masked, text=masked.text[:place], spans=spans)

    def _encode(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(
            texts,
            # The template has written every special token; adding them would double the BOS.
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # of length: that is this class's business
        )

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
        shortened = [self._shortened(masked) for masked in texts]
        encoded = self._encode([masked.text for masked in shortened])
        return [
            self._cut(MaskedTokens(masked.text, ids, mask, left_out=masked.left_out))
            for masked, ids, mask in zip(
                shortened,
                encoded.input_ids,
                map(self._mask, shortened, encoded.input_ids, encoded.encodings),
                strict=True,
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
        return replace(
            row,
            input_ids=kept_ids,
            is_trained=kept_mask,
            is_cut=True,
            num_cut_off=sum(mask) - sum(kept_mask),
            num_needed=0 if any(kept_mask) else needed,
        )


class Seams:
    """Places at which a text can be cut, and its beginning still has the same tokens.

    An added token is looked for before all else, and what stands before it is tokenized alone. So
    they are where one begins that takes no blanks before it along, and that no other reaches into;
    and between words, where the tokenizer takes each by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
        self._all = {token.content for token in added}
        self._lengths = sorted({len(content) for content in self._all})
        marks = [t.content for t in added if not (t.normalized or t.lstrip)]
        seams = list(map(re.escape, sorted(marks, key=len, reverse=True)))
        if _takes_words_apart(tokenizer) and not any(map(_takes_blanks_of_words, added)):
            seams.append(_BETWEEN_WORDS)
        if any(token.single_word for token in added):
            seams = []
        self._seam = re.compile("|".join(seams) or r"(?!)")

    def behind(self, text: str, place: int) -> int | None:
        """Return the first such place from one on, if it is not the text's end."""
        starts = (found.start() for found in self._seam.finditer(text, place))
        return next((start for start in starts if not self._is_within(text, start)), None)

    def _is_within(self, text: str, place: int) -> bool:
        """Does an added token begin before a place, and end behind it?"""
        return any(
            text[first : first + length] in self._all
            for length in self._lengths
            for first in range(max(0, place - length + 1), place)
        )


def _takes_blanks_of_words(token: AddedToken) -> bool:
    begins, ends = token.content[0].isalnum(), token.content[-1].isalnum()
    return (token.lstrip and begins) or (token.rstrip and ends)


def _takes_words_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does a word's end before a blank part what is tokenized, whatever stands on both sides?

    So it does for what splits from left to right, which tries show; without a splitter, merges
    could reach from anywhere to anywhere.
    """
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    if splitter is None:
        return False
    for left, right in product(_LEFT, _RIGHT):
        alone, together = (splitter.pre_tokenize_str(text) for text in (left, left + right))
        if together[: len(alone)] != alone or together[len(alone)][1][0] != len(left):
            return False
    return True


def _by_ends(masked: MaskedText, ends: list[int]) -> list[bool]:
    if not masked.spans:
        return [False] * len(ends)
    ends_T = np.array(ends, dtype=np.int64)
    starts, stops = np.array(masked.spans).T
    last_begun_T = np.searchsorted(starts, ends_T, side="left") - 1
    return ((last_begun_T >= 0) & (ends_T <= stops[last_begun_T])).tolist()
