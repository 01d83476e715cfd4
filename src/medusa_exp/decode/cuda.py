"""CUDA C++ source in; kernels that can be launched on torch's current stream, out.

The sources lie in the package medusa_exp.kernels. A wheel that was built with MEDUSA_EXP_CUDA_ARCHS
has them compiled beside the source (`prebuilt.json` says from which); else, or where that does not
fit, CuPy compiles them at first use and keeps the outcome in its own cache on disk.
"""

import hashlib
import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from medusa_exp.errors import UserError

Grid = tuple[int, int, int]

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


class Kernels(Protocol):
    """Where kernels run. Tests run the same source on the CPU."""

    device: torch.device
    num_processors: int
    has_clusters: bool
    """Whether blocks can read each other's shared memory (from sm_90 on)."""

    def launch(
        self,
        file: str,
        defines: tuple[str, ...],
        entry: str,
        grid: Grid,
        threads: int,
        arguments: np.ndarray,
    ) -> None:
        """Launch an entry of a file of medusa_exp.kernels, which takes one struct by value.

        Args:
            file: such as greedy.cu.
            defines: macros that the file is compiled with.
            entry: the kernel's name.
            grid: blocks along x, y, z.
            threads: of a block.
            arguments: the struct, as a structured array of one element.
        """
        ...


def folder() -> Traversable:
    """Return where the sources are."""
    return files("medusa_exp.kernels")


def source_of(file: str, where: Traversable | Path | None = None) -> str:
    """Return a kernel file with what it includes put in its place, each file once.

    The compiler then needs no include path, and CuPy's cache, which looks at this text alone,
    notices every change.
    """
    where = folder() if where is None else where
    seen: set[str] = set()

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (where / name).read_text("utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: text_of(found[1]), text)

    return text_of(file)


def hash_of(source: str) -> str:
    """Return what a prebuilt module is known by."""
    return hashlib.sha256(source.encode()).hexdigest()


def prebuilt_name(file: str, defines: tuple[str, ...]) -> str:
    """Return the file name of a kernel file compiled ahead of time."""
    return "-".join([Path(file).stem, *(word.lower() for word in defines)]) + ".fatbin"


def find_prebuilt(
    file: str, defines: tuple[str, ...], capability: int, where: Traversable | Path | None = None
) -> Traversable | Path | None:
    """Return the module compiled ahead of time, if it fits this source and a device.

    Machine code runs on devices of the same generation and of the same or a later number in it:
    what is made for 80 runs on 86 and 89, not on 90.
    """
    where = folder() if where is None else where
    record = where / "prebuilt.json"
    if not record.is_file():
        return None
    entry = json.loads(record.read_text("utf-8")).get(prebuilt_name(file, defines))
    if entry is None or entry["sha256"] != hash_of(source_of(file, where)):
        return None
    fits = any(arch // 10 == capability // 10 and arch <= capability for arch in entry["archs"])
    return where / prebuilt_name(file, defines) if fits else None


class CupyKernels:
    """Kernels on a CUDA device, by way of CuPy.

    Raises:
        UserError: CuPy is not installed, or finds no device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise UserError(
                f"the kernels need a CUDA device, and this is {device}: set decode.verifier=torch."
            )
        try:
            import cupy
        except ImportError as error:
            raise UserError(
                "the kernels need CuPy: pip install 'medusa-exp[cuda]', or set "
                f"decode.verifier=torch. ({error})"
            ) from error
        self._cupy = cupy
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.num_processors: int = properties.multi_processor_count
        self.capability: int = properties.major * 10 + properties.minor
        self.has_clusters = self.capability >= 90
        self._modules: dict[tuple[str, ...], Any] = {}
        self._functions: dict[tuple[str, ...], Any] = {}

    def launch(
        self,
        file: str,
        defines: tuple[str, ...],
        entry: str,
        grid: Grid,
        threads: int,
        arguments: np.ndarray,
    ) -> None:
        """Launch an entry on torch's current stream; see `Kernels`."""
        function = self._functions.get((file, *defines, entry))
        # Read at every call: a stream that was remembered would be missing from a captured graph.
        stream = SimpleNamespace(ptr=torch.cuda.current_stream(self.device).cuda_stream)
        if function is None:
            function = self._load(file, defines, entry)
        if torch.cuda.current_device() == self.device.index:
            function(grid, (threads, 1, 1), (arguments,), stream=stream)
            return
        with self._cupy.cuda.Device(self.device.index):
            function(grid, (threads, 1, 1), (arguments,), stream=stream)

    def _load(self, file: str, defines: tuple[str, ...], entry: str) -> Any:
        key = (file, *defines)
        with self._cupy.cuda.Device(self.device.index):
            if key not in self._modules:
                self._modules[key] = self._module(file, defines)
            try:
                function = self._modules[key].get_function(entry).kernel
            except self._cupy.cuda.compiler.CompileException as error:
                raise RuntimeError(
                    f"{file} does not compile for sm_{self.capability}:\n{error}"
                ) from error
        self._functions[(*key, entry)] = function
        return function

    def _module(self, file: str, defines: tuple[str, ...]) -> Any:
        prebuilt = find_prebuilt(file, defines, self.capability)
        if prebuilt is not None:
            return self._cupy.RawModule(path=str(prebuilt))
        return self._cupy.RawModule(
            code=source_of(file), options=tuple(f"-D{word}" for word in defines)
        )
