"""Tokenised documents in; batches of tensors out, for Lightning.

Shapes: B rows, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medusa_exp.data.batches import BatchSampler, Row, epoch_planner, padded_length
from medusa_exp.data.examples import Example, Examples


@dataclass
class Batch:
    """Rows of one or several documents, filled up with padding on the right."""

    input_ids_BT: Tensor
    is_trained_BT: Tensor
    """Never at padding."""
    documents_BT: Tensor
    """Number of the row's document that a token belongs to, from 1; 0 at padding."""
    positions_BT: Tensor | None
    """Places within the document. None where each row has but one, for which they just count on."""

    def to(self, device: torch.device) -> "Batch":
        """Move to a device; Lightning calls this."""
        values = [getattr(self, field.name) for field in fields(self)]
        return Batch(*(None if value is None else value.to(device) for value in values))


def collate(rows: Sequence[Sequence[Example]], row_tokens: int | None = None) -> Batch:
    """Put documents one after the other into rows, and fill up to the next multiple of 64.

    But not beyond `row_tokens`, unless a document is longer: a model may have no more positions.
    """
    longest = max(sum(len(example.input_ids) for example in row) for row in rows)
    width = padded_length(longest)
    shape = (len(rows), width if row_tokens is None else min(width, max(longest, row_tokens)))
    ids_BT, is_trained_BT = np.zeros(shape, np.int64), np.zeros(shape, bool)
    documents_BT, positions_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            place = slice(start, start + len(example.input_ids))
            ids_BT[b, place] = example.input_ids
            is_trained_BT[b, place] = example.is_trained
            documents_BT[b, place] = number
            positions_BT[b, place] = np.arange(len(example.input_ids))
            start = place.stop
    is_packed = any(len(row) > 1 for row in rows)
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(is_trained_BT),
        torch.from_numpy(documents_BT),
        torch.from_numpy(positions_BT) if is_packed else None,
    )


class _Rows(Dataset[list[Example]]):
    """Rows of documents by their numbers, as a `BatchSampler` names them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __getitem__(self, row: Row) -> list[Example]:
        return [self.examples[number] for number in row]


class Batches(L.LightningDataModule):
    """Training batches in the seed's order, and a fixed set of validation batches, if any."""

    def __init__(
        self,
        train: Examples,
        val: Examples | None,
        *,
        batching: str,
        batch_tokens: int,
        row_tokens: int,
        seed: int,
        val_batches: int = 0,
        accumulate: int = 1,
    ) -> None:
        """Plan batches.

        Args:
            train: documents to walk through, again and again.
            val: documents to validate on, one pass at most.
            batching: padded or packed.
            batch_tokens: tokens of a batch, padding included.
            row_tokens: the length limit of documents.
            seed: decides the order.
            val_batches: validation batches, at most.
            accumulate: batches to an optimiser step, to know where a resumed run stands.
        """
        super().__init__()
        self.train = train
        self.val = val
        self.val_batches = val_batches
        self.accumulate = accumulate
        # A row need not be longer than a batch, unless a document is.
        row = max(min(row_tokens, batch_tokens), int(train.lengths.max(initial=1)))
        self.row_tokens = row_tokens
        self._train_epoch = epoch_planner(
            batching,
            train.lengths,
            batch_tokens=batch_tokens,
            row_tokens=row,
            seed=seed,
            weights=train.weights,
        )
        self._val_epoch = None
        if val is not None and len(val):
            self._val_epoch = epoch_planner(
                "padded", val.lengths, batch_tokens=batch_tokens, row_tokens=row, seed=seed
            )

    def batches_per_epoch(self) -> int:
        """Count the batches of the first pass over the training documents; later ones are alike."""
        return len(self._train_epoch(0))

    def train_dataloader(self) -> DataLoader[Batch]:
        """As many batches as the trainer's steps take, after those already used."""
        assert self.trainer is not None
        sampler = BatchSampler(
            self._train_epoch,
            self.trainer.max_steps * self.accumulate,
            start=self.trainer.global_step * self.accumulate,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return _loader(self.train, sampler, self.row_tokens)

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """The same batches at every validation, on every process."""
        if self.val is None or self._val_epoch is None:
            return []
        sampler = BatchSampler(self._val_epoch, min(self.val_batches, len(self._val_epoch(0))))
        return _loader(self.val, sampler, self.row_tokens)


def _loader(
    examples: Sequence[Example], sampler: BatchSampler, row_tokens: int
) -> DataLoader[Batch]:
    """Build a loader in this process: filling tensors is far cheaper than the step they feed."""
    fill = partial(collate, row_tokens=row_tokens)
    return DataLoader(_Rows(examples), batch_sampler=sampler, collate_fn=fill)
