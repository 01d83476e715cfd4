"""Launches of the project's own kernels on an emulated GPU: their source, compiled for the CPU."""

import tempfile
from pathlib import Path
from typing import Any

import emulated_device
import numpy as np
import torch
from kernel_shim import ShimKernels


class EmulatedKernels:
    """What stands for medusa_exp's CupyKernels; see decode.cuda.runtime.Kernels."""

    capability = 90
    num_processors = 132
    has_clusters = True

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", 0)
        self._folder = tempfile.TemporaryDirectory()
        self._shim = ShimKernels(Path(self._folder.name))

    def launch(
        self,
        file: str,
        defines: tuple[str, ...],
        entry: str,
        grid: tuple[int, int, int],
        threads: int,
        arguments: np.ndarray[Any, Any],
    ) -> None:
        """Launch an entry, or record that."""
        emulated_device.ran[entry] += 1
        told = arguments.copy()  # by value, as CUDA takes it
        emulated_device.run_or_record(
            lambda: self._shim.launch(file, defines, entry, grid, threads, told)
        )
