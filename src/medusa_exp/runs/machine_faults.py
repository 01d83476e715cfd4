"""What the machine refuses, in a message that names path and remedy: a full disk, missing rights.

Only what a machine can be short of is put in words. An error of another kind, such as a file that
is missing where one of ours should be, stays what it is, with its traceback.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_exp.errors import UserError

_ELSEWHERE = "choose another run_dir or cache_dir"
_OTHER_PLACE = "give the key that named this place another one (such as export.out)"
_FULL = f"make room there, or {_ELSEWHERE}"
_TOLD = {
    errno.ENOSPC: ("its disk is full", _FULL),
    errno.EDQUOT: ("the quota of its disk is used up", _FULL),
    errno.EFBIG: ("no file may be so large there (see ulimit -f)", f"raise that, or {_ELSEWHERE}"),
    errno.EROFS: ("its file system is read-only", _ELSEWHERE),
    errno.EACCES: ("permission is denied", f"give it those rights, or {_ELSEWHERE}"),
    errno.EPERM: ("it is not permitted", f"give it those rights, or {_ELSEWHERE}"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter run_dir, cache_dir or name"),
    errno.ENOTDIR: ("a file stands where a directory should", f"move it, or {_ELSEWHERE}"),
    errno.EEXIST: ("a file stands where a directory should", f"move it, or {_ELSEWHERE}"),
    errno.ENOENT: ("no directory can be made there", _ELSEWHERE),
    errno.ELOOP: ("its links lead in a circle", f"remove one, or {_ELSEWHERE}"),
    errno.EIO: ("its disk reports an error", f"see the system's log, or {_ELSEWHERE}"),
    errno.ESTALE: ("its file system was taken away", "mount it again"),
    errno.ENODEV: ("its file system was taken away", "mount it again"),
    errno.EMFILE: ("too many files are open", "raise ulimit -n"),
    errno.ENFILE: ("too many files are open on this machine", "close some programs"),
    errno.ENOMEM: ("the machine has no memory left", "close some programs, or lower batch sizes"),
}
"""Number of an error -> what it is, and what to do."""
_IN_WORDS = re.compile(r"\[Errno (\d+)\]|os error (\d+)|Os \{ code: (\d+)")
"""How libraries write of Rust and C++ (safetensors, tokenizers, Arrow) give an error's number."""
_SMALLEST_ROOM = 1 << 16


def message(error: BaseException, places: tuple[str | Path, ...] = ()) -> str | None:
    """Return what to tell of an error, None if it is not the machine's.

    Args:
        error: or what it was raised from.
        places: directories that were being written to: an error seldom says whose disk is full.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, UserError):
        number = _number(found)
        if number in _TOLD and not _is_other(found, number):
            return _told(found, number, places)
        found = found.__cause__ or _of_torch(found)
    return None


def is_ours(error: BaseException) -> bool:
    """Is it a fault of a program, whose traceback tells more, and not of the machine or a user?"""
    return not isinstance(error, UserError) and message(error) is None


def of_full_disk(error: BaseException, path: Path) -> str | None:
    """Return what to tell where it is a full disk that has kept `path` from being written.

    Of an error without that number, as libraries raise them (torch's is "unexpected pos"), the disk
    itself tells.
    """
    if isinstance(error, UserError):
        return None
    number = _number(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return message(OSError(number, ""), (path,))
    return message(OSError(errno.ENOSPC, ""), (path,)) if _is_full(path.parent) else None


@contextmanager
def told(*places: str | Path) -> Iterator[None]:
    """Turn what the machine refuses into a UserError; `places` as for `message`.

    Raises:
        UserError: names path and remedy.
    """
    try:
        yield
    except Exception as error:
        if (said := message(error, places)) is None:
            raise
        raise UserError(said) from error


def _of_torch(error: BaseException) -> BaseException | None:
    """Return what torch.save met, which fails once more as it closes its file."""
    return error.__context__ if "unexpected pos" in str(error) else None


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    found = _IN_WORDS.search(str(error))
    return int(found[found.lastindex or 1]) if found else None


def _is_other(error: BaseException, number: int) -> bool:
    """Is it a slip of ours after all: a directory made twice, or a file that is missing?"""
    if number not in (errno.EEXIST, errno.ENOENT):
        return False
    if not (name := getattr(error, "filename", None)):
        return True
    path = Path(os.fsdecode(name))
    if number == errno.EEXIST:
        return not (path.is_file() or _leads_nowhere(path))
    return not (path.parent.is_dir() and _is_of_mkdir(error))


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _is_of_mkdir(error: BaseException) -> bool:
    """Did a directory refuse to have one in it, as /proc does by the words for a missing file?"""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name in ("mkdir", "makedirs")


def _told(error: BaseException, number: int, places: tuple[str | Path, ...]) -> str:
    what, remedy = _TOLD[number]
    names = [getattr(error, key, None) for key in ("filename2", "filename")]
    named = [os.fsdecode(name) for name in names if isinstance(name, str | bytes)]
    place = named[-1] if named else _full_one(places, number)
    if number == errno.EEXIST and place and _leads_nowhere(Path(place)):
        what, remedy = "it is a link to what is not there", f"remove it, or {_ELSEWHERE}"
    if number == errno.ENOSPC and place and _has_room(Path(place)) is False:
        what = "its disk has no room for another file (inodes; see df -i)"
    if named and places and not any(_is_below(named[-1], one) for one in places):
        remedy = remedy.replace(_ELSEWHERE, _OTHER_PLACE)
    said = f"{_short(place)} could not be written or read" if place else "A file was refused"
    return f"{said}: {what}. To go on: {remedy}; then give the same command again."


def _is_below(path: str, place: str | Path) -> bool:
    # Not Path.resolve, which a loop of links fails.
    inner, outer = os.path.realpath(path), os.path.realpath(Path(place).expanduser())
    return Path(inner).is_relative_to(outer)


def _full_one(places: tuple[str | Path, ...], number: int) -> str:
    """Return the place whose disk is full, the first if none is (it may have room again)."""
    known = [Path(place) for place in (*places, tempfile.gettempdir()) if str(place)]
    if number in (errno.ENOSPC, errno.EDQUOT) and (full := [*filter(_is_full, known)]):
        return str(full[0])
    return str(known[0]) if places else ""


def _is_full(path: Path) -> bool:
    place = _existing(path)
    return place is not None and shutil.disk_usage(place).free < _SMALLEST_ROOM


def _has_room(path: Path) -> bool | None:
    """Is there room for another file's name, where it is known? Some file systems count none."""
    place = _existing(path)
    if place is None or not hasattr(os, "statvfs"):
        return None
    status = os.statvfs(place)
    return status.f_favail > 0 if status.f_files else None


def _existing(path: Path) -> Path | None:
    for place in (path, *path.parents):
        try:
            if place.exists():
                return place
        except OSError:
            continue
    return None


def _short(place: str) -> str:
    return place if len(place) <= 300 else f"{place[:200]}... ({len(place):,} characters)"
