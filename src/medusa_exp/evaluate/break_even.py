"""When not to speculate: from how many prompts at a time on plain decoding is faster, as measured.

The more prompts are answered side by side, the busier the device is with one token of each, and the
more the other nodes of their trees cost. Between two measured sizes the speed-up is taken to fall
evenly with the logarithm of the size; of what lies beyond the largest nothing is said. A size whose
95 % interval holds 1 is neither faster nor slower, and does not count.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Schedule = list[list[int]]
"""[first batch size, last, tokens to draft], the form of vLLM's
`num_speculative_tokens_per_batch_size`: both ends count, and the last entry holds for larger
batches too."""


@dataclass(frozen=True)
class BreakEven:
    """From which batch size on plain decoding is faster."""

    method: str
    speedups: dict[int, float]
    """Batch size -> speed-up over plain decoding at that size, the smallest first."""
    size: float | None
    """Where the speed-up passes 1, by the sizes that count: the smallest of them, if it is above 1
    at none; None where it is above 1 at the largest, or none counts."""
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Batch size -> the 95 % interval of its speed-up, where it is known."""

    @property
    def slower_from(self) -> int | None:
        """The smallest whole number of prompts at a time that is not below; None if none is."""
        return None if self.size is None else math.ceil(self.size)

    @property
    def drafts_up_to(self) -> int:
        """The most prompts at a time of which plain decoding is not known to be faster, or 0."""
        if self.size is None:
            return max(self.speedups)
        # Below the smallest size measured nothing is known.
        return math.ceil(self.size) - 1 if self.size > min(self.speedups) else 0

    def sentence(self) -> str:
        """Say it, and between which measurements it lies."""
        first, last = min(self.speedups), max(self.speedups)
        unclear = [size for size in self.speedups if self.is_unclear(size)]
        if len(unclear) == len(self.speedups):
            largest = f", and no clearer one up to {self._at(last)}" if last > first else ""
            return (
                f"No clear difference from plain decoding at {self._at(first)}{largest}: more "
                "prompts would show whether there is one (evaluate.num_prompts)."
            )
        if self.size is None and first == last < 64:
            return (
                f"Only {self._at(first)} was measured: evaluate.batch_sizes=[1,4,16,64] finds the "
                "size from which on plain decoding is faster."
            )
        if self.size is None:
            found, where = "was faster than", "lies beyond it: measure a larger one to find it"
            if last in unclear:
                found = "showed no clear difference from"
                where = "is not known: more prompts (evaluate.num_prompts) or a larger one may tell"
            return (
                f"Decoding over the {self.method} {found} plain decoding at the largest "
                f"batch size measured, {self._at(last)}. The size from which on plain decoding is "
                f"faster {where}."
            )
        if self.size <= first:
            others = ", ".join(map(self._at, unclear))
            but = f", but for {others}: no clear difference" if others else ""
            smaller = " Smaller ones were not measured: evaluate.batch_sizes=[1] would tell."
            return (
                f"Plain decoding was faster at every batch size measured, from {self._at(first)}"
                f"{but}.{smaller if first > 1 else ''}"
            )
        said = f"From {prompts(self.slower_from or 0)} at a time on, plain decoding is faster than "
        counted = [size for size in self.speedups if size not in unclear]
        above = min(size for size in counted if size >= self.size)
        below = max((size for size in counted if size < self.size), default=None)
        if below is None:
            between = f"it was at {self._at(above)}"
            besides = unclear
        else:
            between = f"between {self._at(below)} and {self._at(above)}"
            besides = [size for size in unclear if size > above]
        but = "; no clear difference at " + ", ".join(map(self._at, besides)) if besides else ""
        return f"{said}over the {self.method}: {between}{but}."

    def _at(self, size: int) -> str:
        said = f"{self.speedups[size]:.2f}x"
        if self.is_unclear(size):
            low, high = self.intervals[size]
            said += f", 95 %: {low:.2f} to {high:.2f}"
        return f"{prompts(size)} at a time ({said})"

    def is_unclear(self, size: int) -> bool:
        """May it be that plain decoding is as fast?"""
        return _holds_1(self.intervals.get(size))

    def schedule(self, num_tokens: int | Schedule) -> Schedule:
        """Return how many tokens an engine should draft at which batch size: none from here on.

        By the speed-ups as they were measured, whatever their intervals: an engine does one or the
        other, and the likelier is better.

        Args:
            num_tokens: below this size: a number, or a schedule of which the rest is cut off.
        """
        last = max(self.speedups)
        wanted = [[1, last, num_tokens]] if isinstance(num_tokens, int) else num_tokens
        likely = break_even(self.method, self.speedups)
        limit = likely.drafts_up_to
        kept = [[low, min(high, limit), n] for low, high, n in wanted if low <= limit]
        if likely.size is None:
            return [list(entry) for entry in wanted]
        return [*kept, [limit + 1, max(limit + 1, last, wanted[-1][1]), 0]]


def break_even(
    method: str,
    speedups: Mapping[int, float],
    intervals: Mapping[int, tuple[float, float]] | None = None,
) -> BreakEven:
    """Return where the speed-up passes 1 for good: sizes above it that count are all slower.

    Args:
        method: that was measured.
        speedups: batch size -> speed-up over plain decoding at that size.
        intervals: batch size -> its 95 % interval, where it is known.
    """
    known = intervals or {}
    ordered = dict(sorted(speedups.items()))
    sizes = [size for size in ordered if not _holds_1(known.get(size))]
    faster = [size for size in sizes if ordered[size] > 1]
    if not sizes or sizes[-1] in faster:
        return BreakEven(method, ordered, None, known)
    if not faster:
        return BreakEven(method, ordered, float(sizes[0]), known)
    below = max(faster)
    above = sizes[sizes.index(below) + 1]
    way = (ordered[below] - 1) / (ordered[below] - ordered[above])
    # Rounded, as a whole number must not become a little more.
    size = round(below * (above / below) ** way, 6)
    return BreakEven(method, ordered, size, known)


def _holds_1(interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] < 1 < interval[1]


def prompts(number: int) -> str:
    """Return `1 prompt`, `2 prompts`."""
    return f"{number} prompt{'' if number == 1 else 's'}"
