"""What pyarrow reads, which is an extra: Parquet, Arrow, and the examples of earlier versions.

Rows are Python values that JSON has room for, of columns of any type. Most are what pyarrow makes
of them. It fails, or makes what nothing can write, of moments that no calendar of Python's has, of
nanoseconds, of structs with two fields of one name, and of types that libraries have added; and
pairs of a map are no object.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medusa_exp.data import faults
from medusa_exp.data.contents import BLOCK, ROWS_TOGETHER, Budget, Content
from medusa_exp.data.examples import COLUMNS, Ragged, Table, encoded
from medusa_exp.data.turns import CALLS, PICTURES, TOOLS
from medusa_exp.errors import UserError

Choose = Callable[[list[str]], list[str]]
"""From the names of all columns of a table to those that are read."""
_USUAL_TIMES = 50
"""How many times its packed size a column of texts may have; most have three to ten times."""
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_OF_TEMPLATES = (*TOOLS, *CALLS)
"""Keys of what templates get as JSON: there each value has to be one of JSON's."""
_KNOWN_EXTENSIONS = ("arrow.uuid", "arrow.bool8", "arrow.json")
"""Those of which pyarrow makes other values than of what they are stored as."""


def rows_of_parquet(content: Content, choose: Choose) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, which is mapped where it stands in a file as it is.

    Raises:
        DataError: it is damaged, or unpacks to absurd sizes.
    """
    is_mapped = content.path is not None and content.compression() is None
    place = content.path if is_mapped else pa.BufferReader(content.whole())
    with (
        _refusing_damage(content.name),
        pq.ParquetFile(place, buffer_size=BLOCK, pre_buffer=False) as table,
    ):
        columns = _without_pixels(table, choose(table.schema_arrow.names))
        together = _check_expansion(table, columns, content.budget)
        for batch in table.iter_batches(together, columns=columns):
            content.budget.spend(batch.nbytes)
            yield from rows_of_batch(batch)


def rows_of_arrow(content: Content, is_stream: bool, choose: Choose) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow stream, or of an Arrow file (Feather), mapped where it can be.

    Its lengths and offsets are checked: what is read by a wrong one may end the process.

    Raises:
        DataError: it is damaged, or unpacks to absurd sizes, as is seen batch by batch.
    """
    data = content.whole()
    if is_stream and data[-len(_END_OF_STREAM) :] != _END_OF_STREAM:
        raise faults.no_end(content.name)
    opened = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    with _refusing_damage(content.name), opened(pa.BufferReader(data)) as table:
        columns = choose(table.schema.names)
        is_shared = any(_shares_values(table.schema.field(column).type) for column in columns)
        together = 1 if is_shared else ROWS_TOGETHER
        whole = table if is_stream else map(table.get_batch, range(table.num_record_batches))
        for batch in whole:
            content.budget.spend(batch.nbytes)
            chosen = batch.select(columns)
            chosen.validate(full=True)
            for start in range(0, len(chosen), together):
                yield from rows_of_batch(chosen.slice(start, together))


@contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise faults.unreadable(name, error) from error


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


def rows_of_batch(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch.

    Raises:
        UnicodeDecodeError: a text is not UTF-8.
    """
    if not any(_is_odd_column(field) for field in batch.schema):
        try:
            rows: list[dict[str, Any]] = batch.to_pylist()
        except (OverflowError, ValueError, LookupError):  # of a value that pyarrow has no other for
            pass
        else:
            return rows
    columns = {
        field.name: [_of_key(field.name, value, _holds_turns(field.type)) for value in column]
        for field, column in zip(batch.schema, batch.columns, strict=True)
    }
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _shares_values(kind: pa.DataType) -> bool:
    """May one stored value be that of many rows, and so be as many in Python?"""
    types = pa.types
    is_shared = ("dictionary", "run_end_encoded", "string_view", "binary_view", "list_view")
    if any(getattr(types, f"is_{name}", lambda kind: False)(kind) for name in is_shared):
        return True
    return any(map(_shares_values, _inner(kind)))


def _inner(kind: pa.DataType) -> list[pa.DataType]:
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    if isinstance(kind, pa.DictionaryType):
        return [kind.value_type]
    return [kind.field(place).type for place in range(kind.num_fields)]


def _is_odd_column(field: pa.Field) -> bool:
    return _holds_turns(field.type) or _is_odd(field.type, field.name in _OF_TEMPLATES)


def _holds_turns(kind: pa.DataType) -> bool:
    """Are these lists of maps, which may be turns?"""
    inner = _inner(kind)
    return len(inner) == 1 and not pa.types.is_map(kind) and pa.types.is_map(inner[0])


def _is_odd(kind: pa.DataType, is_json: bool) -> bool:
    """Is pyarrow not to be left with values of a type?"""
    types = pa.types
    if is_json and (
        types.is_temporal(kind)
        or types.is_decimal(kind)
        or types.is_map(kind)
        or "binary" in str(kind)
        or isinstance(kind, pa.BaseExtensionType)
    ):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name not in _KNOWN_EXTENSIONS
    if types.is_struct(kind):
        return any(_is_odd(field.type, is_json or field.name in _OF_TEMPLATES) for field in kind)
    return getattr(kind, "unit", "") == "ns" or any(_is_odd(one, is_json) for one in _inner(kind))


def _of_key(name: str, scalar: pa.Scalar, is_turns: bool) -> Any:
    """Return what stands under a key."""
    if name in _OF_TEMPLATES:
        return msgspec.to_builtins(_value(scalar, True))
    return _value(scalar, is_turns)


def _value(scalar: pa.Scalar, has_objects: bool) -> Any:
    """Return a value; with `has_objects`, a map is an object."""
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name in _KNOWN_EXTENSIONS:
            return scalar.as_py()
        return _value(scalar.value, has_objects)
    if isinstance(scalar, pa.DictionaryScalar | pa.UnionScalar | pa.RunEndEncodedScalar):
        return _value(scalar.value, has_objects)
    if isinstance(scalar, pa.MapScalar):
        pairs = [
            tuple(_value(one[place], has_objects) for place in (0, 1)) for one in scalar.values
        ]
        is_object = has_objects and all(isinstance(key, str) for key, _ in pairs)
        return dict(pairs) if is_object else pairs
    if isinstance(scalar, pa.ListScalar):
        return [_value(one, has_objects) for one in scalar.values]
    if isinstance(scalar, pa.StructScalar):
        fields = enumerate(kind)
        return {
            field.name: _of_key(field.name, scalar[place], has_objects) for place, field in fields
        }
    return _moment(scalar) if pa.types.is_temporal(kind) else scalar.as_py()


def _moment(scalar: pa.Scalar) -> Any:
    """Return a moment or a time, of nanoseconds those that make microseconds.

    What Python's calendar has no day for is the number that it is stored as.
    """
    kind = scalar.type
    try:
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            scalar = pc.cast(scalar, pa.timestamp("us", kind.tz), safe=False)
        elif pa.types.is_duration(kind) and kind.unit == "ns":
            scalar = pc.cast(scalar, pa.duration("us"), safe=False)
        elif pa.types.is_time(kind) and kind.unit == "ns":
            scalar = pc.cast(scalar, pa.time64("us"), safe=False)
        return scalar.as_py()
    except (OverflowError, ValueError, LookupError):
        return scalar.value


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
