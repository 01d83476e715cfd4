"""How much the batches of an Arrow stream or file unpack to, by their own account.

pyarrow unpacks a batch as a whole and does not say beforehand how large it will be. The file does:
a message's metadata, a FlatBuffer, says where its buffers are, and each that is packed begins with
its unpacked length. https://arrow.apache.org/docs/format/Columnar.html
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

_MAGIC = 8
"""Bytes before the first message of a file; a stream has none."""
# Places of fields in Message.fbs, and numbers in its union of headers.
_HEADER_TYPE, _HEADER = 1, 2
_DICTIONARY, _BATCH = 2, 3
_DATA, _BUFFERS, _COMPRESSION = 1, 2, 3


def unpacked_sizes(data: memoryview, is_stream: bool) -> Iterator[int]:
    """Yield the bytes that each message unpacks to: none, where it is not packed.

    Raises:
        ArrowException, OSError: it is damaged.
    """
    source = pa.BufferReader(data if is_stream else data[_MAGIC:])
    reader = pa.ipc.MessageReader.open_stream(source)
    for message in iter(lambda: _next(reader), None):
        try:
            yield _unpacked_size(message.metadata, message.body)
        except struct.error as error:
            raise pa.ArrowInvalid("a message's metadata are broken") from error


def _next(reader: pa.ipc.MessageReader) -> pa.ipc.Message | None:
    try:
        return reader.read_next_message()
    except StopIteration:
        return None


def _unpacked_size(metadata: pa.Buffer, body: pa.Buffer | None) -> int:
    table = _follow(metadata, 0)
    (kind,) = _read(metadata, "<B", _field(metadata, table, _HEADER_TYPE)) or (0,)
    place = _field(metadata, table, _HEADER)
    if body is None or place is None or kind not in (_DICTIONARY, _BATCH):
        return 0
    batch = _follow(metadata, place)
    if kind == _DICTIONARY and (place := _field(metadata, batch, _DATA)) is not None:
        batch = _follow(metadata, place)
    buffers = _field(metadata, batch, _BUFFERS)
    if buffers is None or _field(metadata, batch, _COMPRESSION) is None:
        return 0
    start = _follow(metadata, buffers)
    (number,) = struct.unpack_from("<I", metadata, start)
    total = 0
    for index in range(number):
        offset, length = struct.unpack_from("<qq", metadata, start + 4 + 16 * index)
        if length >= 8:
            total += max(0, struct.unpack_from("<q", body, offset)[0])  # -1: left as it was
    return total


def _follow(buffer: pa.Buffer, place: int) -> int:
    """Return the place that an offset leads to."""
    return place + int(struct.unpack_from("<I", buffer, place)[0])


def _field(buffer: pa.Buffer, table: int, index: int) -> int | None:
    """Return the place of a table's field, or None where it has its default."""
    names = table - struct.unpack_from("<i", buffer, table)[0]
    (size,) = struct.unpack_from("<H", buffer, names)
    entry = 4 + 2 * index
    (offset,) = struct.unpack_from("<H", buffer, names + entry) if entry < size else (0,)
    return table + offset if offset else None


def _read(buffer: pa.Buffer, kind: str, place: int | None) -> tuple[int, ...]:
    return () if place is None else struct.unpack_from(kind, buffer, place)
