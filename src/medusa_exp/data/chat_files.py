"""Chat files: find those that a path names, and yield their raw chats one by one.

JSON list, JSON Lines, Parquet, and each of them in gzip or zstd, are told apart by content. JSON
Lines and Parquet are streamed; a JSON list is mapped into memory, and its chats are views of it.
A file that cannot be read is a `DataError`; what is wrong with a chat is not looked at here.
"""

import io
import logging
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_exp.data import faults
from medusa_exp.data.faults import DataError
from medusa_exp.data.parsing import COLUMNS, RawChat

log = logging.getLogger(__name__)

_SUFFIXES = tuple(
    f".{kind}{packed}"
    for kind in ("json", "jsonl", "ndjson", "parquet")
    for packed in ("", ".gz", ".zst")
)
_BLOCK = 1 << 20
_ROWS = 256
"""Rows of a table that are in memory as Python objects."""
_BOM = b"\xef\xbb\xbf"

_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_value = msgspec.json.Decoder(msgspec.Raw).decode


def find_files(path: str | Path) -> list[Path]:
    """Return the file, the chat files of the folder at any depth, or what the glob matches.

    Raises:
        DataError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        # Hidden ones are caches and unfinished downloads.
        files = [
            p
            for p in sorted(place.rglob("*"))
            if p.is_file() and not any(n.startswith(".") for n in p.relative_to(place).parts)
        ]
        found = [p for p in files if p.name.lower().endswith(_SUFFIXES)]
        if passed_over := [str(p.relative_to(place)) for p in files if p not in found]:
            named = ", ".join(passed_over[:5]) + (" ..." if len(passed_over) > 5 else "")
            log.warning("data: %s: %d files passed over: %s", place, len(passed_over), named)
        if not found:
            raise DataError(
                f"{place} holds no *.json, *.jsonl, *.ndjson or *.parquet, plain or as .gz or .zst."
            )
        return found
    # Path.glob would need the pattern cut from its root.
    matches = glob(str(place), recursive=True)  # noqa: PTH207
    found = sorted(Path(match) for match in matches if Path(match).is_file())
    if not found:
        raise DataError(f"{place}: there is no such file, folder or match. Check dataset.path.")
    return found


@dataclass
class ChatFile:
    """An iterable over the raw chats of a file."""

    path: Path
    line: int = field(default=0, init=False)
    """Line of the newest chat, from 1; 0 where chats are not lines."""

    @property
    def name(self) -> str:
        """Return what errors call it."""
        return str(self.path)

    def __iter__(self) -> Iterator[RawChat]:
        self.line = 0
        try:
            yield from self._chats()
        except DataError:
            raise
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise faults.unreadable(self.path, error) from error

    def _chats(self) -> Iterator[RawChat]:
        head = self._head()
        if error := faults.foreign(self.name, head):
            raise error
        if head.startswith(b"PAR1"):
            yield from self._rows()
        elif head.startswith(b"["):
            yield from _whole_text(self.name, self._text(), _decode_list)
        elif _goes_on_over_lines(head):
            self.line = 1
            yield _whole_text(self.name, self._text(), _decode_value)
        else:
            yield from self._lines()

    def _head(self) -> bytes:
        """Return the beginning, without byte-order mark and white space."""
        with _open(self.path) as file:
            head = file.read(_BLOCK).removeprefix(_BOM).lstrip()
            while not head:
                block = file.read(_BLOCK)
                if not block:
                    raise faults.empty(self.name)
                head = block.lstrip()
        return head

    def _lines(self) -> Iterator[bytes]:
        with _open(self.path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line and not line.isspace():
                    self.line = number
                    yield line

    def _rows(self) -> Iterator[dict[str, Any]]:
        place = self.path if _compression(self.path) is None else pa.BufferReader(self._text())
        with pq.ParquetFile(place, buffer_size=_BLOCK, pre_buffer=False) as table:
            columns = chat_columns(self.name, table.schema_arrow.names)
            for batch in table.iter_batches(_ROWS, columns=columns):
                yield from batch.to_pylist()

    def _text(self) -> memoryview:
        """Return the whole content, mapped where it stands in the file as it is."""
        if _compression(self.path) is None:
            with self.path.open("rb") as file:
                text = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            data = bytearray()  # grows in place, where joined blocks would need it all twice
            with _open(self.path) as file:
                while block := file.read(_BLOCK):
                    data += block
            text = memoryview(data).toreadonly()
        return text[len(_BOM) :] if text[: len(_BOM)] == _BOM else text


@dataclass
class HubData:
    """An iterable over the rows of a data set of the Hugging Face hub, or of such a folder."""

    path: str
    split: str
    line: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        """Return what errors call it."""
        return f"hub:{self.path}"

    def fingerprint(self) -> str:
        """Name the content, as the library does: it changes with the revision or the files."""
        return str(self._load()._fingerprint)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        table = self._load()
        table = table.select_columns(chat_columns(self.name, table.column_names))
        for batch in table.with_format("arrow").iter(_ROWS):
            yield from batch.to_pylist()

    def _load(self) -> Any:
        try:
            import datasets  # type: ignore[import, unused-ignore]
        except ImportError as error:
            raise DataError(
                f"{self.name} needs the package datasets: pip install 'medusa-exp[hub]'"
            ) from error
        try:
            return datasets.load_dataset(self.path, split=self.split)
        except Exception as error:  # of many libraries, and of none in common
            raise DataError(
                f"{self.name}, split {self.split}, cannot be loaded: {str(error).rstrip('.')}. "
                f"Check dataset.path and dataset.hub_split."
            ) from error


def chat_columns(name: str, columns: list[str]) -> list[str]:
    """Return the columns of a table that are to be read.

    Raises:
        DataError: none of them has chats; names them all.
    """
    chosen = [column for column in COLUMNS if column in columns]
    if not {"conversations", "messages"} & set(chosen):
        raise faults.no_chat_column(name, columns)
    return chosen


def _compression(path: Path) -> str | None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return "gzip"
    # The second is zstd's too: a frame to be skipped, as some tools write first.
    is_zstd = magic == b"\x28\xb5\x2f\xfd" or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", magic)
    return "zstd" if is_zstd else None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading what it holds once it is unpacked."""
    compression = _compression(path)
    with path.open("rb", buffering=_BLOCK) as file:
        if compression is None:
            yield file
            return
        with (
            pa.CompressedInputStream(file, compression) as stream,
            io.BufferedReader(stream, _BLOCK) as unpacked,
        ):
            yield unpacked


def _goes_on_over_lines(head: bytes) -> bool:
    """Tell one value over several lines from JSON Lines, whose first line may well be broken."""
    if not head.startswith(b"{"):
        return False
    lines = head.split(b"\n", 2)
    return len(lines) > 1 and all(map(_is_cut_off, (lines[0], b"\n".join(lines[:2]))))


def _is_cut_off(text: bytes) -> bool:
    try:
        _decode_value(text)
    except msgspec.DecodeError as error:
        return str(error) == "Input data was truncated"
    except RecursionError:
        return True
    return False


def _whole_text(name: str, text: memoryview, decode: Callable[[memoryview], Any]) -> Any:
    """Decode the outermost JSON value; what it is made of are views of its text.

    Raises:
        DataError: it is no JSON, which knows no NaN, for one; says where.
    """
    try:
        return decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise faults.not_json(name, text, error) from error
