"""Cache entries that runs share: made once, by one process, and whole when they appear.

An entry is a file or a directory under `<root>/<kind>/`, named by the key of all that decides its
content (`runs.files.content_key`). Of several processes that want it, one makes it and the others
wait; one that is killed leaves nothing that counts as an entry. Each has a seal (`runs/seals.py`),
and one that is damaged is made anew.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_exp.runs.files import publish
from medusa_exp.runs.locks import locked
from medusa_exp.runs.seals import damage, seal

log = logging.getLogger(__name__)


@contextmanager
def entry(
    root: str | Path, kind: str, name: str, is_whole: Callable[[Path], bool] = Path.exists
) -> Iterator[tuple[Path, Path | None]]:
    """Yield the path of an entry and, if it is yet to be made, where to write it.

    Args:
        root: of the cache.
        kind: a directory in it.
        name: the entry's key, and a suffix if it is a file.
        is_whole: tells an entry from one that lacks something, and is made anew.

    Raises:
        UserError: the disk is full.
    """
    path = Path(root) / kind / name
    if _is_good(path, is_whole):
        yield path, None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(path), what=f"{path}, which is being made"):
        if _is_good(path, is_whole):  # another process has made it meanwhile
            yield path, None
            return
        with publish(path) as partial:
            yield path, partial
            seal(partial, path)


def lock_of(path: Path) -> Path:
    """Return the lock that is held by who makes an entry, or removes it."""
    return path.with_name(f".{path.stem}.lock")


def _is_good(path: Path, is_whole: Callable[[Path], bool]) -> bool:
    """Is an entry there, and what was written?"""
    if not path.exists():
        return False
    name = damage(path)
    if name is None and is_whole(path):
        return True
    log.warning("%s is damaged: %s is made anew", name or path, path)
    return False
