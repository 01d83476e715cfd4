"""Chat files: find those that a path names, and yield their raw chats one by one.

JSON list, JSON Lines, an object of lists, Parquet, Arrow, and each of them packed (gzip, bzip2, xz,
zstd, zip, tar), are told apart by content; CSV and TSV by name. JSON Lines and tables are streamed;
a JSON list is mapped into memory, and its chats are views of it. A file that cannot be read is a
`DataError`; what is wrong with a chat is not looked at here.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from errno import ELOOP, ENOENT
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Any

import msgspec

from medusa_exp.data import faults, record_faults
from medusa_exp.data.contents import (
    ARCHIVES,
    ROWS_TOGETHER,
    SUFFIXES,
    Content,
    content_of,
    members_of,
)
from medusa_exp.data.faults import DataError
from medusa_exp.data.raw_chats import RawChat, TooLong
from medusa_exp.data.saved_datasets import files_beside_rows, is_saved
from medusa_exp.data.tables import records_of_object, rows_of_text
from medusa_exp.data.turn_lists import is_turn

log = logging.getLogger(__name__)

_PARQUET = b"PAR1"
_ARROW_STREAM = b"\xff\xff\xff\xff"
_ARROW = (b"ARROW1\0\0", _ARROW_STREAM)
"""How tables begin; the stream, which the library datasets saves, with the mark of a message."""

_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_value = msgspec.json.Decoder(msgspec.Raw).decode


def find_files(path: str | Path) -> list[Path]:
    """Return the file, the chat files of the folder at any depth, or what the glob matches.

    Raises:
        DataError: there is none.
    """
    if re.match(r"https?://", str(path)):
        raise faults.of_web(str(path))
    place = Path(path).expanduser()
    with faults.of_reading(place):
        if place.is_file():
            return [place]
        if place.is_dir():
            return _chat_files_below(place)
        if place.exists():
            raise faults.no_regular_file(place)
    return _matches_of(place)


_LOST = "lost+found"
"""A folder of the system's in a disk's uppermost one, which nobody else may read."""


def _chat_files_below(place: Path) -> list[Path]:
    files, other_kinds = _files_below(place)
    chosen = {p for p in files if p.name.lower().endswith((*SUFFIXES, *ARCHIVES))}
    chosen -= files_beside_rows(files)
    found = [p for p in files if p in chosen]
    others = other_kinds + [str(p.relative_to(place)) for p in files if p not in chosen]
    if not found:
        raise faults.no_chat_files(str(place), others)
    faults.say_passed_over(str(place), others)
    return found


def _matches_of(pattern: Path) -> list[Path]:
    """Return the files that match, each once: `**` follows links, and may come by one twice.

    Raises:
        DataError: there is none, or something on the way may not be read.
    """
    parts = pattern.parts
    for number, part in enumerate(parts):
        if has_magic(part):
            _check_readable(_glob(*parts[: number + (part == "**")], ""))
    found: dict[Path, Path] = {}
    others: dict[Path, str] = {}
    # Of all ways to a file the shortest names it.
    for path in sorted(map(Path, _glob(*parts)), key=lambda path: (len(path.parts), path)):
        place = path.parent.resolve() / path.name  # of a loop, the system follows forty links
        kind = "a folder" if place.is_dir() else _other_kind(place)
        if not kind:
            found.setdefault(place.resolve(), path)
        elif not (place.is_dir() and "**" in parts):
            others.setdefault(place, f"{path} ({kind})")
    faults.say_passed_over(str(pattern), sorted(others.values()))
    if not found:
        raise DataError(f"{pattern}: there is no such file, folder or match. Check dataset.path.")
    return sorted(found.values())


def _glob(*parts: str) -> list[str]:
    # Path.glob would need the pattern cut from its root.
    return glob(os.path.join(*parts), recursive=True)  # noqa: PTH118, PTH207


def _check_readable(folders: Iterable[str]) -> None:
    """Raise a DataError where glob would say nothing: of a folder in which it may not look."""
    for folder in folders:
        if Path(folder).name != _LOST:
            with faults.of_reading(folder):
                os.scandir(folder).close()


def _files_below(place: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a folder at any depth, and what else there is, with the kind of each.

    Folders that links lead to are read last, and none is read twice: its chats would count twice.

    Raises:
        DataError: something in it may not be read.
    """

    def refuse(error: OSError) -> None:
        if Path(error.filename).name != _LOST:
            raise faults.unreadable(error.filename, error) from error
        others.append(f"{Path(error.filename).relative_to(place)} (may not be read)")

    files: list[Path] = []
    others: list[str] = []
    read: set[Path] = set()
    starts = [place]
    for start in starts:  # to which links are added
        if start != place and (why := _why_not_followed(start, read)):
            others.append(f"{start.relative_to(place)} ({why})")
            continue
        for name, inner, names in os.walk(start, onerror=refuse):
            folder, real = Path(name), Path(name).resolve()
            # Hidden ones are caches and unfinished downloads.
            inner[:] = sorted(n for n in inner if not n.startswith(".") and real not in read)
            starts += [folder / n for n in inner if (folder / n).is_symlink()]
            for path in (folder / n for n in names if not n.startswith(".") and real not in read):
                if kind := _other_kind(path):
                    others.append(f"{path.relative_to(place)} ({kind})")
                else:
                    files.append(path)
            read.add(real)
    return sorted(files), sorted(others)


def _why_not_followed(link: Path, read: set[Path]) -> str:
    """Say what speaks against reading the folder that a link leads to, if anything does."""
    real = link.resolve()
    if real in read:
        return "a link to a folder that is read anyway"
    return "a link to a folder that it is in" if real in link.parent.resolve().parents else ""


def _other_kind(path: Path) -> str:
    """Say what stands in the place of a file, or nothing of one.

    Raises:
        DataError: the system does not tell.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (ENOENT, ELOOP) and path.is_symlink():
            return "a broken link"
        raise faults.unreadable(path, error) from error
    return "" if S_ISREG(mode) else "no regular file"


@dataclass
class ChatFile:
    """A file of chats, or an archive of such files."""

    path: Path
    is_named: bool = True
    """Was it named by itself, and not found in a folder?"""
    is_told: bool = field(default=False, init=False)
    """Was it said which members of the archive are passed over?"""

    @property
    def name(self) -> str:
        """Return what errors call it."""
        return str(self.path)

    def _say_passed_over(self, name: str, others: Sequence[str]) -> None:
        if not self.is_told:  # it is read more than once
            faults.say_passed_over(name, others)
        self.is_told = True

    def parts(
        self, columns: tuple[str, ...], max_bytes: int, paths: Mapping[str, str] | None = None
    ) -> Iterator["Part"]:
        """Yield what is read by itself: the file, or the members of an archive in turn.

        `columns` are those that are read of a table, where it has them; of longer lines than
        `max_bytes` the length alone is; `paths` are dataset.columns.
        """
        with faults.of_reading(self.path):
            content = content_of(self.path)
            head = content.head()
            members = members_of(content, head, self._say_passed_over)
            if members is None:
                yield Part(content, columns, self.is_named, max_bytes, paths)
                return
            for member in members:
                yield Part(member, columns, False, max_bytes, paths)


@dataclass
class Part:
    """An iterable over the raw chats of a file, or of one member of an archive."""

    content: Content
    columns: tuple[str, ...]
    is_named: bool
    max_bytes: int
    paths: Mapping[str, str] | None = None
    """What dataset.columns reads of a record: it tells a record from an object of records."""
    line: int = field(default=0, init=False)
    """Line of the newest chat, from 1; 0 where chats are not lines."""
    keys: tuple[str, ...] = field(default=(), init=False)
    """All columns, where it is a table."""

    @property
    def name(self) -> str:
        """Return what errors call it."""
        return self.content.name

    def __iter__(self) -> Iterator[RawChat]:
        self.line = 0
        with faults.of_reading(self.name):
            yield from self._chats()

    def _chats(self) -> Iterator[RawChat]:
        head = self.content.head()
        if error := faults.foreign(self.name, head):
            raise error
        if head.startswith((_PARQUET, *_ARROW)):
            yield from self._rows(head)
        elif faults.is_text_table(self.name):
            yield from self._rows_of_text()
        elif head.startswith(b"[") and not _is_whole_line(head):
            yield from self._items()
        elif _goes_on_over_lines(head):
            self.line = 1
            text = _whole_text(self.name, self.content.whole(), _decode_value)
            yield from _records(self.name, text, self.paths)
        else:
            yield from self._lines()

    def _items(self) -> Iterator[RawChat]:
        text = self.content.whole()
        items = _whole_text(self.name, text, _decode_list)
        if items and is_turn(_value_or_none(items[0])):
            yield text  # the turns of one chat
        else:
            yield from items

    def _lines(self) -> Iterator[RawChat]:
        lines = self.content.lines(self.max_bytes)
        first = next(lines, None)
        second = next(lines, None)
        if first is None:
            return
        if second is None:  # it may hold many records, and be as long as it likes
            self.line = first[0]
            text = first[1] if isinstance(first[1], bytes) else self.content.whole()
            yield from _records(self.name, text, self.paths)
            return
        for self.line, line in chain((first, second), lines):
            yield TooLong(line) if isinstance(line, int) else line

    def _rows(self, head: bytes) -> Iterator[dict[str, Any]]:
        is_parquet = head.startswith(_PARQUET)
        faults.check_pyarrow(self.name, "Parquet" if is_parquet else "Arrow")
        from medusa_exp.data import columnar

        if is_parquet:
            return columnar.rows_of_parquet(self.content, self._chosen)
        is_stream = head.startswith(_ARROW_STREAM)
        return columnar.rows_of_arrow(self.content, is_stream, self._chosen)

    def _chosen(self, present: Sequence[str]) -> list[str]:
        self.keys = tuple(present)
        return chosen_columns(self.name, self.keys, self.columns, self.paths)

    def _rows_of_text(self) -> Iterator[dict[str, Any]]:
        with self.content.open() as file:
            for line, row in rows_of_text(self.name, file):
                self.line, self.keys = line, tuple(row)
                yield row


@dataclass
class HubData:
    """An iterable over the rows of a data set of the Hugging Face hub, or of such a folder."""

    path: str
    split: str
    is_named: bool = True
    line: int = field(default=0, init=False)
    keys: tuple[str, ...] = field(default=(), init=False)
    columns: tuple[str, ...] = field(default=(), init=False)
    paths: Mapping[str, str] | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """Return what errors call it."""
        return f"hub:{self.path}"

    def parts(
        self, columns: tuple[str, ...], max_bytes: int, paths: Mapping[str, str] | None = None
    ) -> Iterator["HubData"]:
        """Yield itself; `columns` are those that are read, where it has them."""
        self.columns, self.paths = columns, paths
        yield self

    def fingerprint(self) -> str:
        """Name the content, as the library does: it changes with the revision or the files."""
        return str(self._load()._fingerprint)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        table = self._load()
        self.keys = tuple(table.column_names)
        table = table.select_columns(chosen_columns(self.name, self.keys, self.columns, self.paths))
        from medusa_exp.data.columnar import rows_of_batch

        for rows in table.with_format("arrow").iter(ROWS_TOGETHER):
            for batch in rows.to_batches():
                yield from rows_of_batch(batch)

    def _load(self) -> Any:
        try:
            import datasets  # type: ignore[import, unused-ignore]
        except ImportError as error:
            raise DataError(
                f"{self.name} needs the package datasets: pip install 'medusa-exp[hub]'"
            ) from error
        if is_saved(Path(self.path)):
            raise DataError(
                f"{self.path} is a folder that save_to_disk has written: it is read by "
                f"dataset=sharegpt dataset.path={self.path}"
            )
        try:
            return datasets.load_dataset(self.path, split=self.split)
        except Exception as error:  # of many libraries, and of none in common
            raise DataError(
                f"{self.name}, split {self.split}, cannot be loaded: {str(error).rstrip('.')}. "
                f"Check dataset.path and dataset.hub_split."
            ) from error


def chosen_columns(
    name: str,
    present: tuple[str, ...],
    wanted: tuple[str, ...],
    paths: Mapping[str, str] | None,
) -> list[str]:
    """Return the columns of a table that are to be read; `paths` are dataset.columns.

    Raises:
        NoChats: there is none; names them all.
        DataError: two have one name.
    """
    chosen = [column for column in wanted if column in present]
    if not chosen:
        raise record_faults.no_form(name, present, "columns", named=(paths or {}).values())
    if twice := [column for column in chosen if present.count(column) > 1]:
        raise record_faults.same_columns(name, twice[0])
    return chosen


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


def _is_whole_line(head: bytes) -> bool:
    """Tell lists a line from one list, which may well stand in one line too."""
    line, newline, rest = head.partition(b"\n")
    if not newline or not rest.strip():
        return False
    try:
        _decode_value(line)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _records(name: str, text: Any, paths: Mapping[str, str] | None) -> Iterator[RawChat]:
    """Yield the chats of a file that is one JSON value, which may be an object of them."""
    found = records_of_object(name, text, paths)
    if found is None:
        yield text
    else:
        yield from found


def _value_or_none(text: Any) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
