"""What lost power leaves of a folder: a simulated disk that has names, and contents when synced.

`PowerCuts(root)` watches this process. The cut is modeled as the worst that journaling file systems
do: every name that was given is there, and of each file no more than what it held when it was last
synced; a file that never was is empty. As a program it runs the command line and keeps the cuts:

    python power_cut.py CUTS_DIR EVERY ARGUMENT ...
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tree = dict[str, bytes]
"""Path below the root -> content."""
_PASSED_OVER = ("wandb",)


class PowerCuts:
    """Notes, at each moment at which a name changes, what a power cut would leave.

    `with PowerCuts(root) as cuts:`; `cuts.trees` has a tree a moment, `cuts.now()` that of now.
    """

    _CHANGES = ("replace", "rename", "unlink", "rmdir")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees: list[Tree] = []
        self._synced: dict[int, bytes] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "PowerCuts":
        self._originals = {name: getattr(os, name) for name in ("fsync", *self._CHANGES)}
        os.fsync = self._fsync
        for name in self._CHANGES:
            setattr(os, name, self._noting(self._originals[name]))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)

    def now(self) -> Tree:
        """Return what a power cut would leave."""
        return {
            str(path.relative_to(self.root)): self._synced.get(path.stat().st_ino, b"")
            for path in self.root.rglob("*")
            if path.is_file() and path.relative_to(self.root).parts[0] not in _PASSED_OVER
        }

    def whole(self) -> Tree:
        """Return what lies there."""
        return {name: (self.root / name).read_bytes() for name in self.now()}

    def _fsync(self, descriptor: int) -> None:
        self._originals["fsync"](descriptor)
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            self._synced[status.st_ino] = path.read_bytes()

    @staticmethod
    def _number_of(path: Any, directory: int | None) -> int:
        """Return the number of a file that is about to be removed, or written over; 0 for none."""
        try:
            status = os.stat(path, dir_fd=directory, follow_symlinks=False)
        except OSError:
            return 0
        return status.st_ino if status.st_nlink == 1 else 0

    def _noting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changes(path: Any, *rest: Any, **options: Any) -> Any:
            going = self._number_of(rest[0] if rest else path, options.get("dir_fd"))
            found = change(path, *rest, **options)
            self._synced.pop(going, None)  # a new file may have its number
            if self.root in Path(os.fspath(rest[0] if rest else path)).absolute().parents:
                self.trees.append(self.now())
            return found

        return changes


def restore(tree: Tree, root: Path) -> None:
    """Make a folder what a power cut has left of it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def main() -> None:
    cuts_dir, every = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    from medusa_exp.cli import main as run

    with PowerCuts(Path.cwd()) as cuts:
        run()
        trees = [*cuts.trees[::every], cuts.now()]
    for number, tree in enumerate(trees):
        restore(tree, cuts_dir / f"{number:03}")


if __name__ == "__main__":
    main()
