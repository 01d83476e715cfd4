"""Batches of tensors from tokenized examples, as a Lightning DataModule.

B rows of a batch, T positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from types import MappingProxyType

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medusa_exp.data.batching import (
    BatchSampler,
    Row,
    epoch_planner,
    label_positions,
    padded_length,
)
from medusa_exp.data.examples import Example, Examples
from medusa_exp.data.feature_cache import Features


@dataclass
class Batch:
    """Rows of one or several examples, filled up with padding on the right."""

    input_ids_BT: Tensor
    is_trained_BT: Tensor
    """Never at padding."""
    example_BT: Tensor
    """Number of the row's example that a token belongs to, from 1; 0 at padding."""
    positions_BT: Tensor | None
    """Places within the example. None where each row has but one, for which they just count on."""
    numbers: list[int] = field(default_factory=list)
    """Numbers of the batch's examples in their data set, row by row."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each example, row by row."""
    labeled: list[Tensor] = field(default_factory=list)
    """Flat positions b * T + t [R] where the lm_head learns, and where each head does."""
    any_labeled: Tensor | None = None
    """Flat positions [U] where any head learns, in order."""
    group_labels: list[int] = field(default_factory=list)
    """Labels of the lm_head and of each head in all micro-batches of the same optimizer step, on
    this process."""
    hidden_BTD: Tensor | None = None
    """The backbone's hidden states, where they are at hand."""
    teacher_BT: Tensor | None = None
    """With them: in place of each trained token, what the backbone says there."""

    def to(self, device: torch.device) -> "Batch":
        """Move to a device; Lightning calls this."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        labeled, any_labeled = values.pop("labeled"), values.pop("any_labeled")
        moved = {k: send(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        places = labeled if any_labeled is None else [*labeled, any_labeled]
        if places:  # in one piece: a copy of its own for each would cost more than the bytes
            places = list(send(torch.cat(places), device).split([len(index) for index in places]))
        if any_labeled is not None:
            any_labeled = places.pop()
        return Batch(**{**values, **moved}, labeled=places, any_labeled=any_labeled)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, without waiting for what is to be done there before."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def collate(
    rows: Sequence[Sequence[Example]],
    row_tokens: int | None = None,
    numbers: Sequence[Row] = (),
    boundary: int | None = None,
    num_heads: int = 0,
) -> Batch:
    """Put examples one after the other into rows, and fill up to the next multiple of 64.

    But not beyond `row_tokens`, unless an example is longer: a model may have no more positions.
    Nor beyond `boundary` for the padding alone: see `Backbone.rotary_boundary`.
    `num_heads`: the heads whose labels are found, besides the lm_head's.
    """
    longest = max(sum(len(example.input_ids) for example in row) for row in rows)
    limits = [max(longest, limit) for limit in (row_tokens, boundary) if limit is not None]
    shape = (len(rows), min([padded_length(longest), *limits]))
    ids_BT, is_trained_BT = np.zeros(shape, np.int64), np.zeros(shape, bool)
    example_BT, positions_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            place = slice(start, start + len(example.input_ids))
            ids_BT[b, place] = example.input_ids
            is_trained_BT[b, place] = example.is_trained
            example_BT[b, place] = number
            positions_BT[b, place] = np.arange(len(example.input_ids))
            start = place.stop
    is_packed = any(len(row) > 1 for row in rows)
    is_trained, example = torch.from_numpy(is_trained_BT), torch.from_numpy(example_BT)
    labeled = label_positions(is_trained, example, num_heads)
    return Batch(
        torch.from_numpy(ids_BT),
        is_trained,
        example,
        torch.from_numpy(positions_BT) if is_packed else None,
        numbers=[number for row in numbers for number in row],
        lengths=[len(example.input_ids) for row in rows for example in row],
        labeled=labeled,
        any_labeled=torch.cat(labeled[1:]).unique() if num_heads else None,
    )


@dataclass(eq=False)
class _BatchesByNumbers(Dataset[Batch]):
    """Batches by the numbers of their examples, as a `BatchSampler` names them."""

    examples: Sequence[Example]
    features: Features | None
    row_tokens: int
    boundary: int | None
    num_heads: int

    def __getitem__(self, rows: list[Row]) -> Batch:
        examples = [[self.examples[number] for number in row] for row in rows]
        batch = collate(examples, self.row_tokens, rows, self.boundary, self.num_heads)
        if self.features is not None:
            batch.hidden_BTD, batch.teacher_BT = self.features.rows(
                rows, batch.example_BT, batch.is_trained_BT, batch.input_ids_BT
            )
        return batch


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
        num_heads: int = 0,
        features: Mapping[str, Features] = MappingProxyType({}),
        boundary: int | None = None,
    ) -> None:
        """Plan batches.

        Args:
            train: examples to walk through, again and again.
            val: examples to validate on, one pass at most.
            batching: padded or packed.
            batch_tokens: tokens of a batch, padding included.
            row_tokens: the length limit of examples.
            seed: decides the order.
            val_batches: validation batches, at most.
            accumulate: batches to an optimizer step, to know where a resumed run stands.
            num_heads: whose labels are found, and counted for each optimizer step.
            features: hidden states of `train` and `val`, where they are at hand.
            boundary: a length of examples whose sides share no batch: `Backbone.rotary_boundary`.
        """
        super().__init__()
        self.train = train
        self.val = val
        self.val_batches = val_batches
        self.accumulate = accumulate
        self.num_heads = num_heads
        self.features = features
        self.row_tokens, self.boundary = row_tokens, boundary
        # A row need not be longer than a batch, unless an example is.
        row = max(min(row_tokens, batch_tokens), int(train.lengths.max(initial=1)))
        planner = partial(
            epoch_planner, batch_tokens=batch_tokens, row_tokens=row, seed=seed, boundary=boundary
        )
        self._train_epoch = planner(batching, train.lengths, weights=train.weights)
        self._val_epoch = planner("padded", val.lengths) if val is not None and len(val) else None

    def batches_per_epoch(self) -> int:
        """Count the batches of the first pass over the training examples; later ones are alike."""
        return len(self._train_epoch(0))

    def train_dataloader(self) -> "Grouped":
        """As many batches as the trainer's steps take, after those already used."""
        assert self.trainer is not None
        sampler = BatchSampler(
            self._train_epoch,
            self.trainer.max_steps * self.accumulate,
            start=self.trainer.global_step * self.accumulate,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return Grouped(self._loader("train", sampler), self.accumulate)

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """The same batches at every validation, on every process."""
        if self.val is None or self._val_epoch is None:
            return []
        sampler = BatchSampler(self._val_epoch, min(self.val_batches, len(self._val_epoch(0))))
        return self._loader("val", sampler)

    def _loader(self, split: str, sampler: BatchSampler) -> DataLoader[Batch]:
        """Load in this process: filling tensors is far cheaper than the step they feed."""
        examples, features = getattr(self, split), self.features.get(split)
        return DataLoader(
            _BatchesByNumbers(examples, features, self.row_tokens, self.boundary, self.num_heads),
            sampler=sampler,
            batch_size=None,
            generator=torch.Generator(),  # else each walk draws one of everybody's random numbers
        )


@dataclass(eq=False)
class Grouped:
    """Micro-batches that know how many labels their optimizer step has: its loss is a mean over
    all of them, and the step's last micro-batch is not there yet when the first one is run."""

    loader: DataLoader[Batch]
    accumulate: int

    def __len__(self) -> int:
        """Count micro-batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while group := list(islice(batches, self.accumulate)):
            counts = [[len(index_R) for index_R in batch.labeled] for batch in group]
            totals = [sum(of_batches) for of_batches in zip(*counts, strict=True)]
            for batch in group:
                batch.group_labels = totals
                yield batch
