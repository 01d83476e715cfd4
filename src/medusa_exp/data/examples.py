"""The files of tokenized examples: columns of numbers, written in parts, read by a memory map.

A directory holds two `.npy` files of each column: `NAME.npy` [P], the values of all rows in turn,
and `NAME.starts.npy` [N + 1], where those of each row begin, and at last the end. Texts are UTF-8.

N rows, P values of a column.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.lib import format as npy

from medusa_exp.errors import UserError

COLUMNS = {"input_ids": "<i4", "is_trained": "|b1", "conversation_id": "|u1", "source": "|u1"}
"""Columns of a table, and the types of their values."""
_STARTS = "<i8"

Row = tuple[Any, Any, str, str]
"""Token ids, which of them are trained, the conversation's id and the name of its source."""


@dataclass(frozen=True)
class Ragged:
    """Arrays of several lengths, one after the other."""

    values_P: np.ndarray
    starts: np.ndarray
    """Where each begins, and at last the end: [N + 1]."""

    @classmethod
    def of(cls, arrays: Iterable[Any], dtype: str) -> "Ragged":
        """Put arrays one after the other."""
        made = [np.zeros(0, dtype), *(np.asarray(array, dtype) for array in arrays)]
        return cls(np.concatenate(made), np.cumsum([len(array) for array in made], dtype=_STARTS))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values_P[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of values of each row."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Table:
    """Tokenized examples, in memory or on disk, as `COLUMNS` has them.

    Raises:
        ValueError: the columns do not fit each other.
    """

    columns: dict[str, Ragged]
    name: str = "a table"
    """What errors call it."""

    def __post_init__(self) -> None:
        ids, masks = self.columns["input_ids"], self.columns["is_trained"]
        if not np.array_equal(ids.starts, masks.starts):
            raise ValueError("there is not a mark of every token")
        if len({len(column) for column in self.columns.values()}) > 1:
            raise ValueError("its columns differ in length")

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Table":
        """Make a table in memory."""
        ids, masks, chats, sources = zip(*rows, strict=True) if (rows := list(rows)) else [()] * 4
        given = ids, masks, map(encoded, chats), map(encoded, sources)
        columns = zip(COLUMNS.items(), given, strict=True)
        return cls({name: Ragged.of(arrays, dtype) for (name, dtype), arrays in columns})

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def strings(self, column: str, rows: np.ndarray | None = None) -> list[str]:
        """Return `conversation_id` or `source` of some rows, or of all.

        Raises:
            UserError: the files that they are read from are damaged.
        """
        found = self.columns[column]
        text, starts = found.values_P.tobytes(), found.starts.tolist()
        chosen = range(len(self)) if rows is None else rows.tolist()
        try:
            return [
                text[starts[i] : starts[i + 1]].decode("utf-8", "surrogatepass") for i in chosen
            ]
        except UnicodeDecodeError as error:
            raise _damaged(self.name, error) from error


def encoded(text: str) -> np.ndarray:
    """Return a text as `COLUMNS` has it."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


@dataclass(frozen=True)
class Example:
    """Token ids of an example, cut to the length limit, and which of them are trained."""

    input_ids: np.ndarray
    is_trained: np.ndarray


class Examples(Sequence[Example]):
    """Some rows of a table of examples; only what is asked for is read from disk."""

    def __init__(
        self, table: Table, rows: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> None:
        """Select rows of a table.

        Args:
            table: what to take them from.
            rows: numbers of the rows to take; None takes all.
            weights: how often each of these rows is to be walked through in a pass; None is once.
        """
        self._input_ids = table.columns["input_ids"]
        self._is_trained = table.columns["is_trained"]
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
        return Example(self._input_ids[row], self._is_trained[row])

    def strings(self, column: str) -> list[str]:
        """Return `conversation_id` or `source` of each example."""
        return self._table.strings(column, self._rows)

    def num_trained(self) -> np.ndarray:
        """Count the trained tokens of each example: this reads all masks."""
        return np.array([int(self._is_trained[int(row)].sum()) for row in self._rows])


class Writer:
    """Writes tables into a new directory, one after the other: `with Writer(path) as file`.

    None is kept in memory, and the files are whole when the last is closed, not before.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._closing = ExitStack()
        self._files = {
            name: [
                self._closing.enter_context(_GrowingArray(path, kind))
                for path, kind in zip(_paths(directory, name), (dtype, _STARTS), strict=True)
            ]
            for name, dtype in COLUMNS.items()
        }
        for _, starts in self._files.values():
            starts.append(np.zeros(1))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)

    def write(self, table: Table) -> None:
        """Append the rows of a table."""
        for name, (values, starts) in self._files.items():
            column = table.columns[name]
            starts.append(column.starts[1:] + values.length)
            values.append(column.values_P)


class _GrowingArray:
    """A one-dimensional `.npy` file, whose header says how long it is once it is closed."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.length = 0
        self._dtype = dtype
        self._file = path.open("wb")
        self._begin = self._write_header()

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        with self._file:
            if kind is not None:  # what is not whole keeps the length 0, and is refused
                return
            self._file.seek(0)
            begin = self._write_header()
            assert begin == self._begin, "numpy leaves room in a header for any length"

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self.length += len(values)

    def _write_header(self) -> int:
        header = {"descr": self._dtype, "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self._file, header)
        return self._file.tell()


def _paths(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"{name}.npy", directory / f"{name}.starts.npy"


def open_examples(directory: Path) -> Table:
    """Open what `Writer` has written, through memory maps.

    Lengths are checked, for by a wrong one what is read would be another row's; not the values
    themselves, for which there are seals.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        columns = {name: _open_column(directory, name) for name in COLUMNS}
        return Table(columns, str(directory))
    except Exception as error:  # numpy has no one kind for headers that it cannot read
        raise _damaged(directory, error) from error


def _open_column(directory: Path, name: str) -> Ragged:
    values_path, starts_path = _paths(directory, name)
    values_P, starts = _open_array(values_path, COLUMNS[name]), _open_array(starts_path, _STARTS)
    if not len(starts) or starts[0] or starts[-1] != len(values_P) or (np.diff(starts) < 0).any():
        raise ValueError(f"{starts_path.name} is of other values")
    return Ragged(values_P, starts)


def _open_array(path: Path, dtype: str) -> np.ndarray:
    """Map a one-dimensional array of a known type, whose file has no more and no less than it."""
    with path.open("rb") as file:
        npy.read_magic(file)
        shape, _, found = npy.read_array_header_1_0(file)
        begin = file.tell()
    length, rest = divmod(path.stat().st_size - begin, np.dtype(dtype).itemsize)
    if found != np.dtype(dtype) or shape != (length,) or rest:
        raise ValueError(f"{path.name} is cut off, or no array of {dtype}")
    if not length:  # of nothing there is no map
        return np.zeros(0, dtype)
    # A plain view: each slice of a map would be one too, which takes longer to make than to read.
    return np.memmap(path, found, "r", begin, shape).view(np.ndarray)


def _damaged(name: Path | str, error: Exception) -> UserError:
    return UserError(
        f"{name} is not what was written there ({error}): delete the directory that it is in, and "
        "it is made anew."
    )
