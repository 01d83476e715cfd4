"""Files and directories that appear under their final name only when they are whole.

Contents are on the disk before the name is, so that lost power leaves no empty file under it.
A killed process may leave a hidden temporary sibling (`.name.partial-...`), never half an artefact.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from medusa_exp.errors import UserError

_SYNC_SECONDS = 1.0


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or a directory at; rename it to `path` on success.

    An existing file is replaced. An existing directory is replaced too, but not in one atomic
    step: there is a moment without it, never one with half of it.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        _open_to_readers(partial)
        _sync(partial)
        if partial.is_dir() and path.exists():
            shutil.rmtree(path)
        partial.replace(path)
        _sync_one(path.parent)
    except Exception as error:
        if isinstance(error, UserError) or not _lacks_room(error, path.parent):
            raise
        raise UserError(
            f"{path} could not be written, for its disk is full: make room there, or choose "
            "another run_dir or cache_dir."
        ) from error
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file or a directory, which another process may be removing too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file, or all of a directory, on the disk: without, power lost leaves empty files."""
    for written in path.rglob("*") if path.is_dir() else ():
        if not written.is_symlink():
            _sync_one(written)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # such as a directory that one may write to, and not list
        return
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems have no sync of directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _open_to_readers(partial: Path) -> None:
    """Give files that a library has made for their owner alone the rights of any new file."""
    written = partial.rglob("*") if partial.is_dir() else [partial]
    private = [path for path in written if path.is_file() and _is_private(path.stat())]
    if not private:
        return
    probe = partial.with_name(f"{partial.name}.rights")
    probe.touch()
    rights = probe.stat().st_mode
    probe.unlink()
    for path in private:
        path.chmod(rights)


def _is_private(status: os.stat_result) -> bool:
    # What is linked from elsewhere has the rights that somebody gave it there.
    return status.st_mode & 0o777 == 0o600 and status.st_nlink == 1


def _lacks_room(error: Exception, directory: Path) -> bool:
    # Libraries have words of their own for it: torch.save's is "unexpected pos".
    is_said = any(words in str(error) for words in ("No space left", "quota exceeded"))
    return is_said or shutil.disk_usage(directory).free < 1 << 16


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused, as JSON has none."""
    with publish(path) as partial:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    with publish(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """Read JSON, or return `default` where there is no such file."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Delete it or restore it.") from error


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON value a line; none where there is no such file.

    A torn last line, left by a killed writer, is passed over.

    Raises:
        UserError: another line is no JSON; names file and line.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is not valid JSON: {error}") from error
    return rows


def drop_torn_line(path: Path) -> None:
    """Cut off an unfinished last line, so that what is appended starts on a line of its own."""
    if path.is_file() and not (data := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


class Appender:
    """Appends JSON values to a file, a line each: `with Appender(path) as file`.

    What is appended outlives this process at once, and the machine a second later at most.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._synced = time.monotonic()

    def __enter__(self) -> "Appender":
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: Any) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def append(self, value: Any) -> None:
        """Append a line."""
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def sha256_file(path: Path) -> str:
    """Return the file's sha256 as 64 hexadecimal digits; a large file is read once a process."""
    status = path.stat()
    return _sha256(path.resolve(), status.st_mtime_ns, status.st_size)


@cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_in_key(
    section: Any, names: Collection[str], but: Collection[str] = ()
) -> dict[str, Any]:
    """Return what a section of the config, a dataclass, adds to a content key.

    A key of the config that came after `names` were written down counts only where it is not at its
    default: what was cached or saved before it keeps its name.

    Args:
        section: of the config.
        names: its keys that always count.
        but: those that never do.
    """
    values, defaults = asdict(section), asdict(type(section)())
    return {
        name: value
        for name, value in values.items()
        if name in names or (name not in but and value != defaults[name])
    }


def content_key(*parts: Any) -> str:
    """Return 16 hexadecimal digits that name these JSON values: the key of a cache entry."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
