"""Locks between processes, on file systems that have none too.

Some network file systems refuse locks (ENOLCK). There a file says who holds what, as
`filelock.SoftFileLock` writes it: of one whose process is gone on this machine nobody waits, of one
that another machine has left, all do.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

log = logging.getLogger(__name__)

_NO_LOCKS = frozenset((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS))


@contextmanager
def locked(path: Path, timeout: float = -1, poll_interval: float = 0.05) -> Iterator[None]:
    """Hold a lock; wait for it so many seconds, or for as long as it takes.

    Args:
        path: a file that may be made, and stays.
        timeout: seconds; -1 waits.
        poll_interval: seconds between two looks.

    Raises:
        filelock.Timeout: another process holds it.
    """
    lock = _acquired(path, timeout, poll_interval)
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path, timeout: float, poll_interval: float) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path)
    try:
        lock.acquire(timeout, poll_interval=poll_interval)
    except OSError as error:  # Timeout is one too, and has no number
        if error.errno not in _NO_LOCKS:
            raise
        _say_soft(path.parent)
        lock = SoftFileLock(path.with_name(f"{path.name}.held"))
        lock.acquire(timeout, poll_interval=poll_interval)
    return lock


@cache
def _say_soft(directory: Path) -> None:
    log.warning(
        "the file system of %s has no locks: files named .*.held stand for them there. Where a "
        "machine that has died left one, all wait until you delete it; a run_dir and a cache_dir "
        "on a local disk need none of this",
        directory,
    )
