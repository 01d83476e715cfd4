"""Batches of one pass over the examples, and which of their positions have a label for a head.

A batch is a list of rows, a row a list of examples, in an order that only the seed decides.
`padded`: examples of similar length, one a row, filled up with padding. `packed`: several examples
a row, which neither see each other nor label each other.

B batch, T time, K heads, R labeled positions.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

_GROUP_BATCHES = 32
"""Batches' worth of examples that are sorted by length together: enough that padding is small, few
enough that a batch's content stays random."""
_GROUP_ROWS = 256
"""Rows' worth of examples that are packed together, at least: the last row of each group stays
half empty."""
_LENGTH_STEP = 64
"""Rows are padded to multiples of this. Few shapes mean few kernels to prepare: oneDNN and CUDA
libraries set up each new shape at a cost, and keep what they set up in memory."""

Row = list[int]
"""Numbers of the examples in it."""
Epoch = list[list[Row]]
"""The batches of one pass."""


def padded_length(length: int) -> int:
    """Return the length that a row of so many tokens is padded to."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _padded(
    lengths: np.ndarray, weights: np.ndarray, rng: np.random.Generator, batch_tokens: int
) -> Epoch:
    """Batch examples of similar length, one a row; one longer than a batch makes a batch alone."""
    batches: Epoch = []
    for group in _groups(lengths, weights, _GROUP_BATCHES * batch_tokens, rng):
        by_length = group[np.argsort(lengths[group], kind="stable")]
        batches.extend(_cut(by_length, lengths, batch_tokens))
    return [batches[i] for i in rng.permutation(len(batches))]


def _packed(
    lengths: np.ndarray,
    weights: np.ndarray,
    rng: np.random.Generator,
    batch_tokens: int,
    row_tokens: int,
) -> Epoch:
    """Batch rows of several examples: the longest first, each into the fullest row that takes it.

    No example is longer than `row_tokens`, and a batch has one row at least.
    """
    assert not len(lengths) or int(lengths.max()) <= row_tokens
    group_tokens = max(_GROUP_BATCHES * batch_tokens, _GROUP_ROWS * row_tokens)
    rows: list[Row] = []
    for group in _groups(lengths, weights, group_tokens, rng):
        longest_first = group[np.argsort(-lengths[group], kind="stable")]
        packed = _best_fit(longest_first.tolist(), lengths[longest_first].tolist(), row_tokens)
        rows += [packed[i] for i in rng.permutation(len(packed))]
    size = max(1, batch_tokens // padded_length(row_tokens))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass(eq=False)
class BatchSampler(Sampler[list[Row]]):
    """Walks through epochs until this process has had `num_batches`.

    Of several processes, each takes every `world`th batch, from its rank on; so the end of an epoch
    needs no filling up. `start` skips what this process has already used: a resumed run sees just
    what the interrupted one would have seen.
    """

    epoch_of: Callable[[int], Epoch]
    num_batches: int
    _: KW_ONLY
    start: int = 0
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        """Count the skipped batches too: a resumed Lightning loop goes on counting."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[Row]]:
        batches = chain.from_iterable(map(self.epoch_of, count()))
        for place, batch in enumerate(islice(batches, self.num_batches * self.world)):
            if place >= self.start * self.world and place % self.world == self.rank:
                yield batch


def epoch_planner(
    batching: str,
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_tokens: int,
    row_tokens: int,
    seed: int,
    weights: np.ndarray | None = None,
    boundary: int | None = None,
) -> Callable[[int], Epoch]:
    """Return the function from the number of a pass to its batches.

    Args:
        batching: padded or packed.
        lengths: tokens of each example.
        batch_tokens: of a batch, padding included.
        row_tokens: of a packed row.
        seed: decides the order, together with the number of the pass.
        weights: how often each example stands in a pass; 1.5 is once or twice, by chance.
        boundary: no batch has examples of both sides of this length: `Backbone.rotary_boundary`.
    """
    sizes = np.asarray(lengths)
    ones = np.ones(len(sizes)) if weights is None else weights
    plan = _padded if batching == "padded" else partial(_packed, row_tokens=row_tokens)
    is_long = sizes > (boundary or np.inf)
    sides = [np.flatnonzero(is_long == side) for side in (False, True)]
    sides = [numbers for numbers in sides if len(numbers)] or sides[:1]

    @lru_cache(maxsize=2)  # planned once to count its batches, and once more to walk through them
    def epoch_of(epoch: int) -> Epoch:
        planned: Epoch = []
        for numbers in sides:
            rng = np.random.default_rng([seed, epoch])
            batches = plan(sizes[numbers], ones[numbers], rng, batch_tokens=batch_tokens)
            planned += [[numbers[row].tolist() for row in batch] for batch in batches]
        if len(sides) == 1:
            return planned
        order = np.random.default_rng([seed, epoch]).permutation(len(planned))
        return [planned[place] for place in order]

    return epoch_of


def _groups(
    lengths: np.ndarray, weights: np.ndarray, group_tokens: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the examples of a pass in random order, so many tokens at a time."""
    times = np.floor(weights + rng.random(len(lengths))).astype(np.int64)
    order = rng.permutation(np.repeat(np.arange(len(lengths)), times))
    if len(order):
        group = np.cumsum(lengths[order]) // group_tokens
        yield from np.split(order, np.flatnonzero(np.diff(group)) + 1)


def _cut(by_length: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for index in by_length.tolist():
        # Sorted upwards: the newest example is the longest, and sets the padded length.
        padded = (len(batch) + 1) * padded_length(int(lengths[index]))
        if batch and padded > batch_tokens:
            yield batch
            batch = []
        batch.append([index])
    if batch:
        yield batch


def _best_fit(examples: list[int], lengths: list[int], row_tokens: int) -> list[Row]:
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example, length in zip(examples, lengths, strict=True):
        place = bisect_left(room, (length, 0))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(example)
        else:
            free, row = row_tokens, len(rows)
            rows.append([example])
        if free > length:
            insort(room, (free - length, row))
    return rows


def is_labeled(is_trained_BT: Tensor, example_BT: Tensor, head: int) -> Tensor:
    """Return [B, T], True where head k learns (k = 0: the backbone's own lm_head).

    That is at position t where token t+1+k is the assistant's and of the same example.
    """
    shift = 1 + head
    is_labeled_BT = torch.zeros_like(is_trained_BT)
    is_labeled_BT[:, :-shift] = is_trained_BT[:, shift:] & (
        example_BT[:, shift:] == example_BT[:, :-shift]
    )
    return is_labeled_BT


def labeled_index(is_trained_BT: Tensor, example_BT: Tensor, head: int) -> Tensor:
    """Return index_R, the flat positions b * T + t that `is_labeled` has, in order."""
    return is_labeled(is_trained_BT, example_BT, head).flatten().nonzero()[:, 0]


def label_positions(is_trained_BT: Tensor, example_BT: Tensor, num_heads: int) -> list[Tensor]:
    """Return index_R of the lm_head and of each head [1 + K].

    How many there are has to be read: it is for tensors on the host, where nothing waits for it.
    """
    return [labeled_index(is_trained_BT, example_BT, k) for k in range(num_heads + 1)]
