"""Files and directories that appear under their final name only when they are whole.

Contents are on the disk before the name is, so that lost power leaves no empty file under it.
A killed process may leave a hidden temporary sibling (`.name.partial-...`), never half an artefact.
Text has the same bytes on every system, since they have checksums.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from medusa_exp.errors import UserError
from medusa_exp.runs import machine_faults
from medusa_exp.runs.processes import is_process_alive, this_process
from medusa_exp.runs.schemas import SCHEMAS, SEAL, Schema, is_seal

log = logging.getLogger(__name__)

_CHECK = "check"
_SYNC_SECONDS = 1.0
MOST_BYTES = 1 << 28
"""Of a JSON file, or a line of one, that is read back."""
_PART = 1 << 20
"""Bytes that are read at a time."""
_EMPTIED = "%s is empty, as lost power leaves files: it counts as missing"
_OWNER = re.compile(r"\.partial-(?P<process>[0-9a-f]{8}-\d+)-")
"""In the name of what is half written: who writes it."""
_REPLACED = re.compile(r"\.(?P<name>.+)\.partial-\w+-\d+-\w+\.replaced")
"""Name of a directory that has just been moved out of the way of a new one."""
_LONG_AGO = 86400.0
"""Seconds without a change after which nobody is writing any more, on whichever machine."""
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def is_partial(path: Path) -> bool:
    """Is this what somebody is just writing, or was killed at, and will be named otherwise?"""
    return path.name.startswith(".") and _OWNER.search(path.name) is not None


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or a directory at; rename it to `path` on success.

    What is there is replaced in one step. Where the system has none for directories, there is a
    moment without one; if the process is killed in it, the next that writes beside it puts the old
    one back.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_leftovers_once(path.parent)
    unique = f"{this_process()}-{uuid.uuid4().hex[:8]}"
    partial = path.parent / f".{path.name}.partial-{unique}"
    replaced = partial.with_name(f"{partial.name}.replaced")
    try:
        yield partial
        _open_to_readers(partial)
        sync(partial)
        if not (partial.is_dir() and path.exists()):
            partial.replace(path)
        elif not _exchange(partial, path):
            with suppress(FileNotFoundError):  # to remove it in its place would halve it first
                path.rename(replaced)
            partial.replace(path)
        _sync_one(path.parent)
    except Exception as error:
        if (said := machine_faults.of_full_disk(error, path)) is None:
            raise
        raise UserError(said) from error
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        remove(partial)
        remove(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Have two names change places in one step; say whether system and file system can."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (_HERE, os.fsencode(one), _HERE, os.fsencode(other))
    return rename is not None and rename(*names, _EXCHANGE) == 0


@cache
def _drop_leftovers_once(directory: Path) -> None:
    drop_leftovers(directory)


def drop_leftovers(directory: Path, name: str = "*", *, is_alone: bool = False) -> None:
    """Remove what killed processes have left half written, and put back what one had moved away.

    Args:
        directory: to look in.
        name: of what was written, or a pattern.
        is_alone: can nobody else be writing there? Else what may be another machine's is kept for a
            day after its last change.
    """
    for left in directory.glob(f".{name}.partial-*"):
        if is_alone or _is_left(left):
            _drop(left)


def _is_left(partial: Path) -> bool:
    owner = _OWNER.search(partial.name)
    if owner and (is_alive := is_process_alive(owner["process"])) is not None:
        return not is_alive
    try:
        newest = max(path.lstat().st_mtime for path in (partial, *partial.rglob("*")))
    except OSError:  # somebody is at work there
        return False
    return time.time() - newest > _LONG_AGO


def _drop(partial: Path) -> None:
    was = _REPLACED.fullmatch(partial.name)
    if was and not (path := partial.with_name(was["name"])).exists():
        with suppress(OSError):  # another process has put it back
            partial.rename(path)
    remove(partial)


def remove(path: Path) -> None:
    """Remove a file or a directory, which another process may be removing too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> bool:
    """Link a file hard, or copy it where the file system cannot; return whether it is linked."""
    source = Path(source).resolve()  # a hub's cache holds links
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        return False
    return True


def sync(path: Path) -> None:
    """Have a file, or all of a directory, on the disk: without, power lost leaves empty files.

    What is not there is passed over.
    """
    for written in path.rglob("*") if path.is_dir() else ():
        if not written.is_symlink():
            _sync_one(written)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    try:
        # Windows syncs what is open to be written.
        descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    except (PermissionError, FileNotFoundError):  # such as a directory that one may not list
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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused, as JSON has none.

    With a checksum, which `read_json` looks at and takes out, where `SCHEMAS` has one for the name.
    """
    if _schema(path).has_check:
        value = {**value, _CHECK: _check_of(value)}
    write_text(path, json_text(value))


def _check_of(value: dict[str, Any]) -> str:
    # As it is read back: JSON has no numbers as keys, and no tuples.
    return content_key(json.loads(json_text({k: v for k, v in value.items() if k != _CHECK})))


def json_text(value: Any) -> str:
    """Return what `write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with the ends of its lines as they are."""
    with publish(path) as partial:
        partial.write_bytes(text.encode())


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    with publish(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, default: Any = None, kind: Any = None) -> Any:
    """Read JSON, or return `default` where there is no such file, or one that lost power emptied.

    Args:
        path: of the file.
        default: what to return then.
        kind: what msgspec is to check it against; left out, the row of `SCHEMAS` for such a name.

    Raises:
        UserError: it is not to be read, no JSON, or does not hold what it should, or what was
            written; says what to do.
    """
    content, schema = _content(path), _schema(path, kind)
    if content is None:
        return default
    value = _value(content, f"{path}", schema)
    if schema.has_check and isinstance(value, dict):
        check = value.pop(_CHECK, None)
        if check is not None and check != _check_of(value):
            raise UserError(
                f"{path} is not what was written there. {_sentence(schema.remedy)} If it was "
                "changed on purpose, or an older version of medusa_exp has gone on with it, which "
                f"leaves its checksum as it was, delete its key `{_CHECK}`."
            )
    return value


def read_jsonl(path: Path, kind: Any = None) -> list[Any]:
    """Read one JSON value a line; none where there is no such file.

    A torn last line, left by a killed writer or by lost power, or of one that is at it, is passed
    over.

    Raises:
        UserError: another line is no JSON, too long, or not what it should be; names file and line.
    """
    if not _is_there(path):
        return []
    rows: list[Any] = []
    schema = _schema(path, kind)
    with _saying_what_failed(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), 1):
            place = f"{path}, line {number},"
            if len(line) == MOST_BYTES:
                raise UserError(
                    f"{place} is longer than {MOST_BYTES >> 20} MiB: no run has written it. "
                    f"{_sentence(schema.remedy)}"
                )
            if not (rows or line.strip(b"\0")):
                log.warning(_EMPTIED, path)
            is_whole = line.endswith(b"\n")
            with nullcontext() if is_whole else suppress(UserError):
                rows += [_value(line, place, schema)] if line.strip() else []
            if not is_whole:  # its writer may have added the rest since, which is no line
                break
    return rows


def _content(path: Path) -> bytes | None:
    """Return the bytes of a file that is ours; None where it is absent, or emptied by lost power.

    Raises:
        UserError: it is no file, too large, or may not be read.
    """
    if not _is_there(path):
        return None
    with _saying_what_failed(path):
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"{path} is larger than {MOST_BYTES >> 20} MiB: no run has written it. Move it "
                "away."
            )
        content = path.read_bytes()
    if content.strip(b"\0"):
        return content
    log.warning(_EMPTIED, path)
    return None


def _is_there(path: Path) -> bool:
    with _saying_what_failed(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file: move it away.")
        return path.exists()


@contextmanager
def _saying_what_failed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error


def _schema(path: Path, kind: Any = None) -> Schema:
    name = SEAL if is_seal(path.name) else path.name
    known = SCHEMAS.get(name, Schema(Any, "Delete it or restore it", has_nan=True))
    return known if kind is None else replace(known, kind=kind)


def _value(content: bytes, place: str, schema: Schema) -> Any:
    """Return the value of some JSON, checked."""
    constant = None if schema.has_nan else _refuse_constant
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=constant)
        msgspec.convert(value, schema.kind)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{place} is not what was written there: {error}. {_sentence(schema.remedy)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place} is not valid JSON: {error}. {_sentence(schema.remedy)}"
        ) from error
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def drop_torn_line(path: Path) -> None:
    """Cut off an unfinished last line, so that what is appended starts on a line of its own.

    Raises:
        UserError: it is no file, or a link to one that is somebody else's.
    """
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, and lines are to be added there: put the file in its place."
        )
    if not _is_there(path):
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:  # from the end on, a part at a time
            start = max(0, end - _PART)
            file.seek(start)
            if (place := file.read(end - start).rfind(b"\n")) >= 0:
                start += place + 1
                break
            end = start
        else:
            start = 0
        if start < size:  # else another process may have added a line since
            file.truncate(start)


class Appender:
    """Appends JSON values to a file, a line each: `with Appender(path) as file`.

    What is appended outlives this process at once, and the machine a second later at most.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._synced = time.monotonic()

    def __enter__(self) -> "Appender":
        self._file = self._path.open("a", encoding="utf-8", newline="")
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
    return _sha256(path.resolve(), status.st_ino, status.st_mtime_ns, status.st_size)


@cache
def _sha256(path: Path, inode: int, mtime_ns: int, size: int) -> str:
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
