"""What a batch of answers has come to: tokens, where each ends, and how long steps took."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Where an answer ends."""

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    """A token that ends the answer, and still belongs to it."""
    stop_strings: Sequence[str] = ()
    """Text that ends the answer: the token with which it is complete is the last."""
    decode_text: Callable[[list[int]], str] | None = None
    """Tokens to text, for `stop_strings`."""

    def __post_init__(self) -> None:
        if self.stop_strings and self.decode_text is None:
            raise ValueError("stop_strings need decode_text, the tokenizer's decode.")


@dataclass
class Decoded:
    """An answer: its tokens, a stop token included, and how they came about.

    One entry a backbone step in the two lists; the first step is the prompt's.
    """

    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


class Answers:
    """The answers to a batch of prompts; rows end at different times."""

    def __init__(self, num_rows: int, limits: Limits) -> None:
        self.decoded = [Decoded() for _ in range(num_rows)]
        self.limits = limits
        self.active = list(range(num_rows)) if limits.max_new_tokens > 0 else []
        """Rows that go on, in order."""
        self.kept: list[int] = list(range(num_rows))
        """Which of those that were active before the last step still are, by their place there."""
        self._stop_ids = frozenset(limits.stop_ids)
        self._clock = time.perf_counter()

    def commit(self, said: list[list[int]]) -> list[list[int]]:
        """Add a step's tokens, up to each answer's end; return those of every row, active or not.

        Args:
            said: tokens of each active row, in their order.
        """
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        added: list[list[int]] = [[] for _ in self.decoded]
        self.kept = []
        for place, (row, tokens) in enumerate(zip(self.active, said, strict=True)):
            answer = self.decoded[row]
            kept, is_done = self._until_end(answer.tokens, tokens)
            answer.tokens += kept
            answer.accept_lengths.append(len(kept))
            answer.step_seconds.append(seconds)
            added[row] = kept
            if not is_done:
                self.kept.append(place)
        self.active = [self.active[place] for place in self.kept]
        return added

    def _until_end(self, before: list[int], tokens: list[int]) -> tuple[list[int], bool]:
        room = self.limits.max_new_tokens - len(before)
        for place, token in enumerate(tokens[:room], 1):
            if token in self._stop_ids or self._is_stop_text(before + tokens[:place]):
                return tokens[:place], True
        return tokens[:room], len(tokens) >= room

    def _is_stop_text(self, tokens: list[int]) -> bool:
        if not self.limits.stop_strings:
            return False
        assert self.limits.decode_text is not None
        # A stop string may begin anywhere before: but not more tokens back than it has bytes.
        longest = max(len(text.encode()) for text in self.limits.stop_strings)
        tail = self.limits.decode_text(tokens[-longest - 1 :])
        return any(text in tail for text in self.limits.stop_strings)
