"""Token sequences in, batches of similar lengths out, in an order that only the seed decides.

Shapes: B sequences, T positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from medusa_exp.data.sources import Example

_GROUP_BATCHES = 32
"""Batches' worth of sequences that are sorted by length together: enough that padding is small,
few enough that a batch's content stays random."""
_LENGTH_STEP = 64
"""Batches are padded to multiples of this. Few shapes mean few kernels to prepare: oneDNN and CUDA
libraries set up each new shape at a cost, and keep what they set up in memory."""


@dataclass
class Batch:
    """Sequences padded on the right; padding is never trained, and a causal model never sees it."""

    input_ids_BT: Tensor
    is_trained_BT: Tensor
    lengths_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move to a device; Lightning calls this."""
        return Batch(
            self.input_ids_BT.to(device), self.is_trained_BT.to(device), self.lengths_B.to(device)
        )


def collate(sequences: Sequence[Example]) -> Batch:
    """Pad sequences with token 0 to the next multiple of 64 after the longest."""
    length = padded_length(max(len(sequence.input_ids) for sequence in sequences))
    input_ids_BT = torch.zeros(len(sequences), length, dtype=torch.long)
    is_trained_BT = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        count = len(sequence.input_ids)
        input_ids_BT[row, :count] = torch.from_numpy(sequence.input_ids)
        is_trained_BT[row, :count] = torch.from_numpy(sequence.is_trained)
    lengths_B = torch.tensor([len(example.input_ids) for example in sequences])
    return Batch(input_ids_BT, is_trained_BT, lengths_B)


def padded_length(length: int) -> int:
    """Return the length that a batch with this longest sequence is padded to."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


class LengthGroupedSampler(Sampler[list[int]]):
    """Yields lists of indices whose padded size is at most `batch_tokens`, pass after pass.

    `num_batches` bounds the whole walk, over as many passes as it takes; `start` skips batches
    already used, so that a resumed run sees exactly what the interrupted one would have seen.
    """

    def __init__(
        self, lengths: Sequence[int], batch_tokens: int, seed: int, num_batches: int, start: int = 0
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.num_batches = num_batches
        self.start = start

    def __len__(self) -> int:
        """Count the skipped batches too: a resumed Lightning loop goes on counting."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        position = 0
        epoch = 0
        while position < self.num_batches:
            for batch in self._epoch(epoch):
                if position >= self.num_batches:
                    return
                if position >= self.start:
                    yield batch
                position += 1
            epoch += 1

    def batches_per_epoch(self) -> int:
        """Count the batches of the first pass; later passes differ by a few at most."""
        return len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        group_tokens = self.batch_tokens * _GROUP_BATCHES
        groups = np.cumsum(self.lengths[order]) // group_tokens
        batches: list[list[int]] = []
        for group in np.unique(groups):
            members = order[groups == group]
            by_length = members[np.argsort(self.lengths[members], kind="stable")]
            batches.extend(self._cut(by_length))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, by_length: np.ndarray) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in by_length:
            # Sorted upwards: the newest sequence is the longest, and sets the padded length.
            padded = (len(batch) + 1) * padded_length(int(self.lengths[index]))
            if batch and padded > self.batch_tokens:
                yield batch
                batch = []
            batch.append(int(index))
        if batch:
            yield batch


def build_loader(sequences: Sequence[Example], sampler: LengthGroupedSampler) -> DataLoader[Batch]:
    """Build a loader in this process; padding is far cheaper than the step it feeds."""
    return DataLoader(sequences, batch_sampler=sampler, collate_fn=collate)
