"""A kernel with a fault put in, and whether the checks notice."""

import faulthandler
import multiprocessing
import os
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from kernel_shim import SOURCES, ShimKernels


def mutate(folder: Path, file: str, old: str, new: str) -> Path:
    """Return a copy of the sources in which `old`, which must stand there once, is `new`."""
    sources = folder / "sources"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    text = (sources / file).read_text("utf-8")
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    (sources / file).write_text(text.replace(old, new), "utf-8")
    return sources


def is_caught(
    sources: Path, folder: Path, check: Callable[[ShimKernels], None], timeout: float = 300
) -> bool:
    """Say whether a check fails on these sources, or crashes, or does not end.

    It runs in a process of its own, which it may take down; after `timeout` seconds it counts as
    a walk without an end.
    """

    def run() -> None:
        faulthandler.disable()
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            check(ShimKernels(folder, sources))
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's threads
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return True
    return process.exitcode != 0
