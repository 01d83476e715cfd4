"""Locks between processes, on file systems that have none too.

Some network file systems refuse locks (ENOLCK). There a file says who holds what, as
`filelock.SoftFileLock` writes it: of one whose process is gone on this machine nobody waits, of one
that another machine has left, all do. Who waits says so, and for whom.
"""

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

_NO_LOCKS = frozenset((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS))
_QUIET, _BETWEEN_LINES = 2.0, 60.0
"""Seconds of waiting before the first line, and from one to the next."""


@contextmanager
def locked(
    path: Path, timeout: float = -1, poll_interval: float = 0.05, what: str | None = ""
) -> Iterator[None]:
    """Hold a lock; wait for it so many seconds, or for as long as it takes.

    Args:
        path: a file that may be made, and stays.
        timeout: seconds; -1 waits.
        poll_interval: seconds between two looks.
        what: what is waited for, in the lines that say so; the lock itself where it is left out, no
            lines for None.

    Raises:
        filelock.Timeout: another process holds it.
    """
    lock = _acquired(path, timeout, poll_interval, what)
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path, timeout: float, poll_interval: float, what: str | None) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path)
    try:
        _acquire(lock, timeout, poll_interval, what)
    except OSError as error:  # Timeout is one too, and has no number
        if error.errno not in _NO_LOCKS:
            raise
        _say_soft(path.parent)
        lock = SoftFileLock(path.with_name(f"{path.name}.held"))
        _acquire(lock, timeout, poll_interval, what)
    return lock


def _acquire(lock: BaseFileLock, timeout: float, poll_interval: float, what: str | None) -> None:
    if timeout >= 0 or what is None:
        lock.acquire(timeout, poll_interval=poll_interval)
        return
    start, patience = time.monotonic(), _QUIET
    while True:
        try:
            lock.acquire(patience, poll_interval=poll_interval)
            return
        except Timeout:
            path, waited = Path(lock.lock_file), round(time.monotonic() - start)
            log.warning(
                "waiting for %s (%d s): %s holds %s", what or path, waited, _holder(path), path
            )
            patience = _BETWEEN_LINES


def _holder(path: Path) -> str:
    """Say which process holds a lock, as far as Linux or the lock itself tells."""
    with suppress(OSError, ValueError, IndexError):
        if words := path.read_text().split():  # of a soft one
            return f"process {words[0]} of machine {words[1]}"
        number = f":{path.stat().st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            kind, process, place = (line.split()[index] for index in (1, 4, 5))
            if kind == "FLOCK" and place.endswith(number):
                return f"process {process}"
    return "another process, perhaps on another machine,"


@cache
def _say_soft(directory: Path) -> None:
    log.warning(
        "the file system of %s has no locks: files named .*.held stand for them there. Where a "
        "machine that has died left one, all wait until you delete it; a run_dir and a cache_dir "
        "on a local disk need none of this",
        directory,
    )
