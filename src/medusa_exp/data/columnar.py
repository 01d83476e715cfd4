"""What pyarrow reads, which is an extra: Parquet, Arrow, and the examples of earlier versions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medusa_exp.data import faults
from medusa_exp.data.contents import BLOCK, ROWS_TOGETHER, Budget, Content
from medusa_exp.data.examples import COLUMNS, Ragged, Table, encoded
from medusa_exp.data.table_values import rows_of_batch, shares_values
from medusa_exp.data.turns import PICTURES
from medusa_exp.errors import UserError

_USUAL_TIMES = 50
"""How many times its packed size a column of texts may have; most have three to ten times."""

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@contextmanager
def opened_parquet(content: Content) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, which is mapped where it stands in a file as it is.

    Raises:
        DataError: it is damaged.
    """
    is_mapped = content.path is not None and content.compression() is None
    place = content.path if is_mapped else pa.BufferReader(content.whole())
    try:
        with pq.ParquetFile(place, buffer_size=BLOCK, pre_buffer=False) as table:
            yield table
    except pa.ArrowException as error:
        raise faults.unreadable(content.name, error) from error


def rows_of_parquet(
    table: pq.ParquetFile, columns: list[str], budget: Budget
) -> Iterator[dict[str, Any]]:
    """Yield the rows of some columns.

    Raises:
        DataError: they unpack to absurd sizes.
    """
    columns = _without_pixels(table, columns)
    together = _check_expansion(table, columns, budget)
    for batch in table.iter_batches(together, columns=columns):
        budget.spend(batch.nbytes)
        yield from rows_of_batch(batch)


@contextmanager
def opened_arrow(
    content: Content, is_stream: bool
) -> Iterator[pa.RecordBatchStreamReader | pa.RecordBatchFileReader]:
    """Open an Arrow stream, or an Arrow file (Feather), mapped where it stands in a file as it is.

    Raises:
        DataError: it is damaged.
    """
    data = content.whole()
    if is_stream and data[-len(_END_OF_STREAM) :] != _END_OF_STREAM:
        raise faults.no_end(content.name)
    try:
        source = pa.BufferReader(data)
        with (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source) as table:
            yield table
    except pa.ArrowException as error:
        raise faults.unreadable(content.name, error) from error


def rows_of_arrow(
    table: pa.RecordBatchStreamReader | pa.RecordBatchFileReader,
    columns: list[str],
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of some columns, whose lengths and offsets are checked.

    Raises:
        ArrowInvalid: they are damaged.
        DataError: they unpack to absurd sizes, as is seen batch by batch.
    """
    is_shared = any(shares_values(table.schema.field(column).type) for column in columns)
    together = 1 if is_shared else ROWS_TOGETHER
    for batch in _batches(table):
        budget.spend(batch.nbytes)
        chosen = batch.select(columns)
        chosen.validate(full=True)
        for start in range(0, len(chosen), together):
            yield from rows_of_batch(chosen.slice(start, together))


def _batches(
    table: pa.RecordBatchStreamReader | pa.RecordBatchFileReader,
) -> Iterator[pa.RecordBatch]:
    if isinstance(table, pa.RecordBatchFileReader):
        yield from map(table.get_batch, range(table.num_record_batches))
    else:
        yield from table


def _without_pixels(table: pq.ParquetFile, columns: list[str]) -> list[str]:
    """Return what is read of columns: of a picture its path alone, which tells that it is there."""
    leaves = [table.schema.column(place).path for place in range(len(table.schema))]
    chosen = []
    for column in columns:
        paths = [p for p in leaves if p.startswith(f"{column}.") and p.endswith(".path")]
        chosen += (paths if column in PICTURES else []) or [column]
    return chosen


def _check_expansion(table: pq.ParquetFile, columns: list[str], budget: Budget) -> int:
    """Return how many rows are safe to read together.

    Raises:
        DataError: the columns unpack to absurd sizes, by the file's own account.
    """
    meta, together = table.metadata, ROWS_TOGETHER
    for group in range(meta.num_row_groups):
        for place in range(meta.num_columns):
            chunk = meta.row_group(group).column(place)
            path = chunk.path_in_schema
            if not any(path == name or path.startswith(f"{name}.") for name in columns):
                continue
            unpacked, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            budget.spend(unpacked)
            # A value stands in a dictionary once, and may be that of every row.
            if chunk.has_dictionary_page and unpacked > max(1 << 22, _USUAL_TIMES * packed):
                together = 1
    budget.num_unpacked = 0  # counted again as it is read
    return together


def read_examples(path: Path) -> Table:
    """Read an Arrow file of examples into memory.

    Its lengths and offsets are checked, for what is read by a wrong one may end the process.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        if any(column.null_count for column in table.columns):
            raise ValueError("it has nulls")
        return Table(
            {name: _ragged(table[name], dtype) for name, dtype in COLUMNS.items()}, f"{path}"
        )
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not what was written there ({error}): delete the directory that it is in, "
            "and run stage regenerate again."
        ) from error


def _ragged(column: pa.ChunkedArray, dtype: str) -> Ragged:
    if pa.types.is_string(column.type):
        return Ragged.of(map(encoded, column.to_pylist()), dtype)
    lists = column.combine_chunks()
    return Ragged(lists.values.to_numpy().astype(dtype), lists.offsets.to_numpy())
