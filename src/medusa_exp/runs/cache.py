"""Cache entries that runs share: made once, by one process, and whole when they appear.

An entry is a file or a directory under `<root>/<kind>/`, named by the key of all that decides its
content (`runs.files.content_key`). Of several processes that want it, one makes it and the others
wait; one that is killed leaves nothing that counts as an entry.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_exp.runs.files import publish, remove
from medusa_exp.runs.locks import locked


@contextmanager
def entry(
    root: str | Path, kind: str, name: str, is_whole: Callable[[Path], bool] = Path.exists
) -> Iterator[tuple[Path, Path | None]]:
    """Yield the path of an entry and, if it is yet to be made, where to write it.

    Args:
        root: of the cache.
        kind: a directory in it.
        name: the entry's key, and a suffix if it is a file.
        is_whole: tells an entry from one that has been damaged since, which is made anew.

    Raises:
        UserError: the disk is full.
    """
    path = Path(root) / kind / name
    if is_whole(path):
        yield path, None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.stem}.lock")):
        if is_whole(path):  # another process has made it meanwhile
            yield path, None
            return
        for leftover in path.parent.glob(f".{path.name}.partial-*"):  # of killed processes
            remove(leftover)
        with publish(path) as partial:
            yield path, partial
