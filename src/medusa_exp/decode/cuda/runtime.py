"""Compile, load and launch the CUDA kernels on torch's current stream.

Machine code compiled ahead of time is taken where it fits (source.py); else CuPy compiles at first
use, and keeps the outcome in its own cache on disk.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.source import find_prebuilt, source_of
from medusa_exp.errors import UserError

Grid = tuple[int, int, int]
MAX_NODES = 256
"""Largest tree that the kernels take, as kernels/cuda/tree.cuh and kernels/cuda/mask.cu have it."""


class Kernels(Protocol):
    """A device that launches kernels. Tests run the same source on the CPU."""

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
            threads: number of threads of a block.
            arguments: the struct, as a structured array of one element.
        """
        ...


def struct_of(integers: str, floats: str = "") -> np.dtype[Any]:
    """Return a struct of 8-byte fields, addresses among the integers, as kernels take it."""
    fields = [(name, np.int64) for name in integers.split()]
    return np.dtype(fields + [(name, np.float64) for name in floats.split()])


def check_tensor(
    kernels: Kernels,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    is_expanded: bool = False,
) -> None:
    """Raise ValueError if a tensor is not what a kernel takes.

    With `is_expanded` its first dimension may have any stride, such as the 0 of an expanded row.
    """
    if value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype}: it must be {dtype}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: it must have {list(shape)}.")
    row = value[0] if is_expanded else value
    if not row.is_contiguous():
        raise ValueError(f"{name} must be contiguous: call .contiguous().")
    if value.device != kernels.device:
        raise ValueError(f"{name} is on {value.device}, the kernels on {kernels.device}.")


def check_rows(kernels: Kernels, name: str, value: Tensor) -> None:
    """Raise ValueError if a tensor is no float32 of three dimensions, contiguous along the last."""
    if value.dtype != torch.float32:
        raise ValueError(f"{name} is {value.dtype}: it must be torch.float32.")
    if value.ndim != 3 or 0 in value.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}: it must have three dimensions, none empty."
        )
    if value.shape[2] > 1 and value.stride(2) != 1:
        raise ValueError(f"{name} must be contiguous along its last dimension.")
    if value.device != kernels.device:
        raise ValueError(f"{name} is on {value.device}, the kernels on {kernels.device}.")


class CupyKernels:
    """Kernels on a CUDA device, launched through CuPy.

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
        # Read at every call: a remembered stream would make a captured graph miss the launches.
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


@cache
def kernels_on(device: torch.device) -> CupyKernels:
    """Return the kernels of a device, compiled once for all users of it."""
    return CupyKernels(device)
