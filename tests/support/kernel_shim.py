"""The kernels' own source, compiled by g++ and run on the CPU (tests/kernels/shim)."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "kernels" / "shim"
SOURCES = ROOT / "kernels" / "cuda"
GXX = shutil.which("g++")
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
FLAGS = (
    *("-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"),
    "-U_FORTIFY_SOURCE",  # on by default in Ubuntu; it aborts at a longjmp between fibers
)
CLUSTERED = ("verify", "filter", "topk")
CLUSTERS = {f"{name}_{size}": size for name in CLUSTERED for size in (1, 2, 4, 8)}


class ShimError(Exception):
    """What the shim saw: a barrier that not all threads reach, or the compiler's words."""


def build(
    file: str,
    defines: tuple[str, ...],
    out: Path,
    sources: Path = SOURCES,
    flags: tuple[str, ...] = (),
) -> Path:
    """Compile a kernel file to a shared library in `out`, if another process has not."""
    assert GXX is not None
    library = out / ("-".join([Path(file).stem, *defines]) + ".so")
    if library.is_file():
        return library
    partial = library.with_suffix(f".{os.getpid()}")
    command = [GXX, *FLAGS, *flags, f"-I{SHIM}", f"-I{sources}", f'-DKERNEL_FILE="{file}"']
    command += [*(f"-D{word}" for word in defines), str(SHIM / "host.cpp"), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShimError(done.stderr)
    return partial.replace(library)


class ShimKernels:
    """Launches on the CPU, threads and blocks in some order; see decode.cuda.runtime.Kernels."""

    device = torch.device("cpu")
    num_processors = 8
    has_clusters = True

    def __init__(self, out: Path, sources: Path = SOURCES, flags: tuple[str, ...] = ()) -> None:
        self.order, self.seed = "forward", 0
        self._out, self._sources, self._flags = out, sources, flags
        self._libraries: dict[tuple[str, ...], ctypes.CDLL] = {}
        self.launched: list[str] = []

    def launch(
        self,
        file: str,
        defines: tuple[str, ...],
        entry: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: np.ndarray,
    ) -> None:
        library = self.library(file, defines)
        assert library.shim_arguments_bytes() == arguments.dtype.itemsize
        error = library.shim_launch(
            ctypes.cast(getattr(library, entry), ctypes.c_void_p),
            arguments.ctypes.data_as(ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_uint(CLUSTERS.get(entry, 1)),
            ORDERS[self.order],
            ctypes.c_uint(self.seed),
        )
        self.launched.append(entry)
        if error is not None:
            raise ShimError(error.decode())

    def library(self, file: str, defines: tuple[str, ...]) -> ctypes.CDLL:
        key = (file, *defines)
        if key not in self._libraries:
            library = ctypes.CDLL(str(build(file, defines, self._out, self._sources, self._flags)))
            library.shim_launch.restype = ctypes.c_char_p
            library.shim_arguments_bytes.restype = ctypes.c_ulonglong
            self._libraries[key] = library
        return self._libraries[key]
