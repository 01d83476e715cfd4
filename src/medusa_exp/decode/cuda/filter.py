"""Logits without the tokens that top-k and top-p leave out, by a CUDA kernel.

`decode.distribution.probabilities` is the specification: of what the kernel returns, and the
temperature, it makes what it makes of the logits with top_k and top_p. In torch top-p sorts each
row twice, at every step; the kernel finds where a row is to be cut (kernels/cuda/filter.cu).

B batch, N places, V vocabulary; a row is the V logits of a place.
"""

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.launch import DEFINES, LOG2_E, LaunchConfig, check_logits
from medusa_exp.decode.cuda.runtime import Kernels, struct_of

ARGUMENTS = struct_of(
    "logits logits_stride_b logits_stride_n filtered filtered_stride_b filtered_stride_n "
    "vocab_size top_k",
    "scale top_p",
)
"""struct Arguments of kernels/cuda/filter.cu."""
_THREADS, _AHEAD = 512, 8
"""Of a block of a cluster; loads of a thread at a time, AHEAD of kernels/cuda/filter.cu."""


def leaves_out(top_k: int | None, top_p: float | None, vocab_size: int) -> bool:
    """Return whether any token may be left out."""
    return (top_k is not None and top_k < vocab_size) or (top_p is not None and top_p < 1)


def filter_config(num_rows: int, vocab_size: int, kernels: Kernels) -> LaunchConfig:
    """Choose for so many rows. (Reasoned, not measured.)

    The largest cluster with which all rows are read at a time, by two blocks to a processor, and a
    thread has as much to load as it loads at a time. Without clusters, a block a row.
    """
    if not kernels.has_clusters:
        return LaunchConfig()
    most = min(2 * kernels.num_processors // num_rows, vocab_size // (_AHEAD * _THREADS))
    return LaunchConfig(next((size for size in (8, 4, 2) if size <= most), 1), _THREADS)


class KernelFilter:
    """Filters with the CUDA kernel. Nothing waits for the device.

    Args:
        kernels: device to launch on.
        config: how every call is launched; None chooses by shape.
    """

    def __init__(self, kernels: Kernels, config: LaunchConfig | None = None) -> None:
        self._kernels, self._config = kernels, config

    def __call__(
        self, logits_BNV: Tensor, temperature: float, top_k: int | None, top_p: float | None
    ) -> Tensor:
        """Return a copy of the logits in which tokens that are left out are minus infinity.

        Args:
            logits_BNV: float32, float16 or bfloat16; any strides but that of V, which is 1.
            temperature: see `decode.distribution.probabilities`, as for the next two.
            top_k: None keeps all.
            top_p: None keeps all.

        Raises:
            ValueError: an argument has the wrong device, type, shape or strides. Nothing is
                launched then.
        """
        check_logits(logits_BNV, self._kernels)
        if (top_k is not None and top_k < 1) or (top_p is not None and not top_p > 0):
            raise ValueError(f"top_k={top_k} must be at least 1, and top_p={top_p} above 0.")
        batch, count, vocab_size = logits_BNV.shape
        config = self._config or filter_config(batch * count, vocab_size, self._kernels)
        config.check(self._kernels)
        filtered_BNV = torch.empty_like(logits_BNV, memory_format=torch.contiguous_format)
        arguments = np.zeros(1, ARGUMENTS)
        arguments[0] = (
            logits_BNV.data_ptr(),
            *logits_BNV.stride()[:2],
            filtered_BNV.data_ptr(),
            *filtered_BNV.stride()[:2],
            vocab_size,
            0 if top_k is None else min(top_k, vocab_size),
            LOG2_E / temperature,
            1.0 if top_p is None else top_p,
        )
        self._kernels.launch(
            "filter.cu",
            DEFINES[logits_BNV.dtype],
            f"filter_{config.cluster}",
            (config.cluster, count, batch),
            config.threads,
            arguments,
        )
        return filtered_BNV
