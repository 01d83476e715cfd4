"""What a chat file holds once it is unpacked: bytes of a file, or of a member of an archive.

gzip, bzip2, xz and zstd are told by their first bytes, as are zip and tar. Nothing is written to
disk, names of members are names only, and what unpacks to absurd sizes is refused.
"""

import gzip
import io
import mmap
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from medusa_exp.data import faults
from medusa_exp.data.faults import DataError, NoChats
from medusa_exp.data.other_kinds import kind_by_members
from medusa_exp.data.saved_datasets import is_cache

SUFFIXES = tuple(
    f".{kind}{packed}"
    for kind in ("json", "jsonl", "ndjson", "parquet", "arrow", "feather", "csv", "tsv")
    for packed in ("", *faults.PACKED)
)
"""Names of what may hold chats, in a folder or an archive."""
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", *(f".tar{packed}" for packed in faults.PACKED))
_MAGIC = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)",
    "xz": rb"\xfd7zXZ\0",
    # The second is zstd's too: a frame to be skipped, as some tools write first.
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}
"""Compression -> how what is compressed begins."""
BLOCK = 1 << 20
_PACKED = 1 << 14
"""Bytes of streams that are read at a time: what stands behind each of them is copied."""
ROWS_TOGETHER = 256
"""Rows of a table that are in memory as Python objects."""
_OCTAL = re.compile(rb"[0-7]{1,7}")
_BOM = b"\xef\xbb\xbf"
_FREELY_UNPACKED = 1 << 28
"""Bytes that anything may unpack to."""
_MOST_TIMES = 250
"""Beyond them: how many times its packed size. Chats shrink to a fifth or a tenth."""


@dataclass
class Budget:
    """How much a file on the disk may unpack to, all of its members together."""

    name: str
    num_packed: int
    num_unpacked: int = 0

    def spend(self, number: int) -> None:
        """Count unpacked bytes.

        Raises:
            DataError: there are more than the packed ones can be believed to hold.
        """
        self.num_unpacked += number
        if self.num_unpacked > max(_FREELY_UNPACKED, _MOST_TIMES * self.num_packed):
            raise DataError(
                f"{self.name} unpacks to more than {_FREELY_UNPACKED >> 20} MiB and {_MOST_TIMES} "
                "times its size: no chats do. If it is what you want, unpack it yourself."
            )


@dataclass(frozen=True)
class Content:
    """The bytes of a file or a member."""

    name: str
    """What messages call it."""
    open_packed: Callable[[], BinaryIO]
    budget: Budget
    path: Path | None = None
    """Where it stands in a file as it is."""

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it for reading what it holds once it is unpacked."""
        compression = self.compression()
        with self.open_packed() as file:
            if compression is None:
                yield file
                return
            stream, damage = _unpacking(self.name, compression, file)
            with (
                stream,
                io.BufferedReader(_Bounded(stream, self.budget, damage), BLOCK) as unpacked,
            ):
                yield unpacked

    def compression(self) -> str | None:
        """Return gzip, bzip2, xz, zstd or None."""
        with self.open_packed() as file:
            begin = file.read(10)
        return next((name for name, magic in _MAGIC.items() if re.match(magic, begin)), None)

    def head(self) -> bytes:
        """Return the beginning, without byte-order mark and white space.

        Raises:
            DataError: there is nothing else.
        """
        with self.open() as file:
            head = file.read(BLOCK).removeprefix(_BOM).lstrip()
            while not head:
                block = file.read(BLOCK)
                if not block:
                    raise faults.empty(self.name)
                head = block.lstrip()
        return head

    def lines(self, max_bytes: int) -> Iterator[tuple[int, bytes | int]]:
        """Yield lines that are not blank, with their numbers from 1; of longer ones their length.

        Blank ones are skipped by the block, for there may be hundreds of millions.
        """
        with self.open() as opened:
            file = opened if hasattr(opened, "peek") else io.BufferedReader(opened, BLOCK)  # type: ignore[type-var]
            number = 0
            while line := file.readline(max_bytes + len(_BOM) + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                if len(line) > max_bytes and not line.endswith(b"\n"):
                    rest, is_blank = _length_of_rest(file)
                    if not (is_blank and line.isspace()):
                        yield number, len(line) + rest
                elif line and not line.isspace():
                    yield number, line
                else:
                    number += _skip_blank_lines(file)

    def whole(self) -> memoryview:
        """Return all of it, mapped where it stands in a file as it is."""
        if self.path is not None and self.compression() is None:
            with self.path.open("rb") as file:
                text = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            data = bytearray()  # grows in place, where joined blocks would need it all twice
            with self.open() as file:
                while block := file.read(BLOCK):
                    data += block
            text = memoryview(data).toreadonly()
        return text[len(_BOM) :] if text[: len(_BOM)] == _BOM else text


def _length_of_rest(file: Any) -> tuple[int, bool]:
    """Read on to the end of a line; return how much that was, and whether it was all blank."""
    number, is_blank = 0, True
    while block := file.readline(BLOCK):
        number += len(block)
        is_blank = is_blank and block.isspace()
        if block.endswith(b"\n"):
            break
    return number, is_blank


def _skip_blank_lines(file: Any) -> int:
    """Read white space at the beginning of a line, and return how many lines end in it."""
    number = 0
    while block := file.peek():
        blank = len(block) - len(block.lstrip())
        number += file.read(blank).count(b"\n")
        if blank < len(block):
            break
    return number


_Damage = tuple[type[Exception], ...]


def _unpacking(name: str, compression: str, file: BinaryIO) -> tuple[Any, _Damage]:
    """Return the stream that a file is unpacked by, and what it raises where that is damaged.

    Raises:
        DataError: that needs pyarrow, which is not installed.
    """
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file), (EOFError, zlib.error)
    if compression == "bzip2":
        import bz2

        return _Streams(bz2.BZ2Decompressor, file), (EOFError,)
    if compression == "xz":
        import lzma

        return _Streams(lzma.LZMADecompressor, file), (EOFError, lzma.LZMAError)
    faults.check_pyarrow(name, f"packed by {compression}")
    import pyarrow as pa

    return pa.CompressedInputStream(file, compression), (pa.ArrowException,)


class _Streams(io.RawIOBase):
    """What is packed in streams of bzip2 or xz, one after the other, with zeros between them.

    `BZ2File` and `LZMAFile` take a later stream that is damaged for the end of the file.
    """

    def __init__(self, start: Callable[[], Any], file: BinaryIO) -> None:
        super().__init__()
        self._start, self._file, self._stream = start, file, start()

    def read(self, size: int = -1) -> bytes:
        """Return so many bytes at most, and none only at the end.

        Raises:
            EOFError: the file ends within a stream; else what the streams raise.
        """
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                if not (packed := self._begin_of_next()):
                    break
                self._stream = self._start()
            elif self._stream.needs_input and not (packed := self._file.read(_PACKED)):
                raise EOFError("it ends within a stream")
            data = self._stream.decompress(packed, size)
        return data

    def _begin_of_next(self) -> bytes:
        packed: bytes = self._stream.unused_data.lstrip(b"\0")
        while not packed and (block := self._file.read(_PACKED)):
            packed = block.lstrip(b"\0")
        return packed


class _Bounded(io.RawIOBase):
    """A stream of unpacked bytes that are counted."""

    def __init__(self, stream: Any, budget: Budget, damage: _Damage) -> None:
        super().__init__()
        self._stream, self._budget, self._damage = stream, budget, damage

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except self._damage as error:
            raise faults.unreadable(self._budget.name, error) from error
        self._budget.spend(len(data))
        buffer[: len(data)] = data
        return len(data)


def content_of(path: Path) -> Content:
    """Return the content of a file."""

    def opened() -> BinaryIO:
        return path.open("rb", buffering=BLOCK)

    return Content(str(path), opened, Budget(str(path), path.stat().st_size), path)


_Say = Callable[[str, Sequence[str]], None]


def members_of(content: Content, head: bytes, say_passed_over: _Say) -> Iterator[Content] | None:
    """Return the chat files of an archive one by one, or None if it is none.

    Each is to be read before the next is asked for. What is passed over is said by the function
    that is given, as `faults.say_passed_over` does.

    Raises:
        NoChats: (once asked for the first) the archive has none.
        DataError: it is damaged, or locked by a password.
    """
    if content.path is None:
        return None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_members(content, say_passed_over)
    return _tar_members(content, say_passed_over) if _is_header_of_tar(head) else None


def _is_header_of_tar(block: bytes) -> bool:
    """Tell by its mark, or its checksum: the oldest format and labels of archives have no mark."""
    if block[257:262] == b"ustar":
        return True
    if not _OCTAL.fullmatch(block[148:156].strip(b" \0")):
        return False
    import tarfile

    try:
        tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _zip_members(content: Content, say_passed_over: _Say) -> Iterator[Content]:
    import zipfile

    damage: _Damage = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
    damage += _damage_of_xz()

    def opened(info: zipfile.ZipInfo) -> BinaryIO:
        try:
            stream = archive.open(info)
        except damage as error:
            raise faults.damaged(f"{content.name}!{info.filename}", error) from error
        return io.BufferedReader(_Bounded(stream, content.budget, damage), BLOCK)

    with content.open_packed() as file:
        try:
            archive = zipfile.ZipFile(file)
        except damage as error:
            raise faults.damaged(content.name, error) from error
        members = [info for info in archive.infolist() if not info.is_dir()]
        chosen = [info for info in members if is_chat_file(info.filename)]
        others = [info.filename for info in members if not is_chat_file(info.filename)]
        if not chosen:
            if words := kind_by_members(others):
                raise NoChats(f"{content.name} {words}")
            raise faults.no_chat_files(content.name, others)
        say_passed_over(content.name, others)
        if any(info.flag_bits & 1 for info in chosen):
            raise DataError(f"{content.name} is locked by a password: unpack it yourself.")
        for info in chosen:
            name = f"{content.name}!{info.filename}"
            yield Content(name, partial(opened, info), content.budget)


def _damage_of_xz() -> _Damage:
    try:
        import lzma
    except ImportError:  # a Python that was built without
        return ()
    return (lzma.LZMAError,)


def _tar_members(content: Content, say_passed_over: _Say) -> Iterator[Content]:
    import tarfile

    class Member(tarfile.TarInfo):
        """A header; tarfile takes a damaged one, or none, for the end, unless it is the first."""

        @classmethod
        def fromtarfile(cls, archive: Any) -> Any:
            try:
                return super().fromtarfile(archive)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
                raise
            except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
                raise tarfile.ReadError(
                    "nothing marks its end: was it cut? If not, unpack it"
                ) from error
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(str(error)) from error

    others: list[str] = []
    is_empty = True
    try:
        with (
            content.open() as file,
            tarfile.open(fileobj=file, mode="r|", tarinfo=Member) as archive,
        ):
            for info in archive:
                if not info.isfile() or info.issparse() or not is_chat_file(info.name):
                    others += [] if info.isdir() else [info.name]
                    continue
                is_empty = False
                # A stream is read forwards only, and a content may be opened again.
                data = archive.extractfile(info).read()  # type: ignore[union-attr]
                name = f"{content.name}!{info.name}"
                yield Content(name, partial(io.BytesIO, data), content.budget)
            _check_end_of_tar(archive.fileobj)
    except tarfile.TarError as error:
        raise faults.damaged(content.name, error) from error
    if is_empty:
        raise faults.no_chat_files(content.name, others)
    say_passed_over(content.name, others)


def _check_end_of_tar(file: Any) -> None:
    """Look at what follows the block of zeros that tarfile has taken for the end.

    Lost power leaves zeros in the place of headers, too. Two blocks of them are an end, behind
    which old programs leave whatever was in their buffer.

    Raises:
        tarfile.ReadError: it was none.
    """
    import tarfile

    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError("a lone block of zeros")
    while block := file.read(tarfile.BLOCKSIZE):
        if _is_header_of_tar(block):
            raise tarfile.ReadError("a file's header after the end")


def is_chat_file(name: str) -> bool:
    """Tell by its name what may hold chats; hidden ones are caches and leftovers of systems."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return name.lower().endswith(SUFFIXES) and not is_hidden and not is_cache(name)
