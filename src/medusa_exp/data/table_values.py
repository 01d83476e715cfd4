"""What the rows of Arrow tables hold, as Python values that JSON has room for, of any type.

Most are what pyarrow makes of them. It fails, or makes what nothing can write, of moments that no
calendar of Python's has, of nanoseconds, of structs with two fields of one name, and of types that
libraries have added; and pairs of a map are no object.
"""

from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from medusa_exp.data.turns import CALLS, TOOLS

_OF_TEMPLATES = (*TOOLS, *CALLS)
"""Keys of what templates get as JSON: there each value has to be one of JSON's."""
_KNOWN_EXTENSIONS = ("arrow.uuid", "arrow.bool8", "arrow.json")
"""Those of which pyarrow makes other values than of what they are stored as."""


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


def shares_values(kind: pa.DataType) -> bool:
    """May one stored value be that of many rows, and so be as many in Python?"""
    types = pa.types
    is_shared = ("dictionary", "run_end_encoded", "string_view", "binary_view", "list_view")
    if any(getattr(types, f"is_{name}", lambda kind: False)(kind) for name in is_shared):
        return True
    return any(map(shares_values, _inner(kind)))


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
