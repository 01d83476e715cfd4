"""The Arrow file of tokenized examples: its schema, and how it is read through a memory map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from medusa_exp.errors import UserError

SCHEMA = pa.schema(
    {
        "input_ids": pa.large_list(pa.int32()),
        "is_trained": pa.large_list(pa.uint8()),
        "conversation_id": pa.string(),
        "source": pa.string(),
    }
)


@dataclass(frozen=True)
class Example:
    """Token ids of an example, cut to the length limit, and which of them are trained."""

    input_ids: np.ndarray
    is_trained: np.ndarray


class Examples(Sequence[Example]):
    """Some rows of an Arrow table of examples; only what is asked for is read from disk."""

    def __init__(
        self, table: pa.Table, rows: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> None:
        """Select rows of a table.

        Args:
            table: of `SCHEMA`.
            rows: numbers of the rows to take; None takes all.
            weights: how often each of these rows is to be walked through in a pass; None is once.
        """
        self._input_ids = _Ragged(table["input_ids"])
        self._is_trained = _Ragged(table["is_trained"])
        self._table = table
        self._rows = np.arange(len(table)) if rows is None else rows
        self.lengths = self._input_ids.lengths[self._rows]
        """Tokens of each example."""
        self.weights = np.ones(len(self._rows)) if weights is None else weights

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return Examples(self._table, self._rows[index], self.weights[index])
        row = int(self._rows[index])
        return Example(self._input_ids[row], self._is_trained[row].view(bool))

    def strings(self, column: str) -> list[str]:
        """Return `conversation_id` or `source` of each example."""
        return self._table[column].take(pa.array(self._rows)).to_pylist()

    def num_trained(self) -> np.ndarray:
        """Count the trained tokens of each example: this reads all masks."""
        return np.array([int(self._is_trained[int(row)].sum()) for row in self._rows])


class _Ragged:
    """A chunked column of lists as numpy views: no copy, no Python object per value."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values = [_view(chunk.values) for chunk in column.chunks]
        self._offsets = [_view(chunk.offsets) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        parts = [np.diff(offsets) for offsets in self._offsets]
        self.lengths = np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - self._starts[chunk]
        start, stop = self._offsets[chunk][place : place + 2]
        return self._values[chunk][start:stop]


def _view(numbers: pa.Array) -> np.ndarray:
    """Return a view of an array without nulls. (Arrow's own `to_numpy` imports pandas.)"""
    dtype = np.dtype(numbers.type.to_pandas_dtype())
    buffer = numbers.buffers()[1]
    if buffer is None or not len(numbers):
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(numbers), numbers.offset * dtype.itemsize)


def open_examples(path: Path) -> pa.Table:
    """Open an Arrow file written with `SCHEMA`, through a memory map.

    Its lengths and offsets are checked, for what is read by a wrong one may end the process; not
    the tokens themselves, for which there are seals.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        if table.schema != SCHEMA:
            raise ValueError("its columns are others")
        for name in ("input_ids", "is_trained"):
            if table[name].null_count:
                raise ValueError(f"{name} has nulls")
    except (OSError, ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{path} is not what was written there ({error}): delete the directory that it is in, "
            "and it is made anew."
        ) from error
    return table
