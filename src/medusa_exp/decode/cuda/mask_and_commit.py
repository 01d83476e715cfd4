"""Attention mask of the draft tree, and commit of accepted nodes to the KV cache, as CUDA kernels.

The same results as decode/masks.py and decode/cache.py give, but from tensors on the device alone:
no call waits for the host or allocates.

B batch, N tree nodes, K columns of the mask, L path length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import MAX_NODES, Kernels, check_tensor, struct_of

MASK_ARGUMENTS = struct_of(
    "parents parents_stride_b lengths last mask positions num_nodes num_past window"
)
"""struct Arguments of kernels/cuda/mask.cu."""
COMMIT_ARGUMENTS = struct_of(
    "tensors stride_b stride_h stride_t path num_accepted from to "
    "path_length num_heads head_units num_columns"
)
"""struct Arguments of kernels/cuda/commit.cu."""


def build_mask(
    kernels: Kernels,
    parents_BN: Tensor,
    lengths_B: Tensor,
    last: Tensor,
    *,
    mask_B1NK: Tensor,
    positions_BN: Tensor,
    window: int | None = None,
) -> None:
    """Write a step's attention mask and positions; see kernels/cuda/mask.cu.

    Args:
        kernels: device to launch on.
        parents_BN: int64; any stride of B.
        lengths_B: int64, number of cached tokens of each row.
        last: int64 without sizes, the last position; later ones are clamped to it.
        mask_B1NK: bool, written; its first K - N columns are the cache's, its last the tree's.
        positions_BN: int64, written: cached tokens + depth, at most `last`.
        window: number of positions a node sees, itself included, in sliding-window attention.

    Raises:
        ValueError: a tensor has the wrong device, type, shape or strides.
    """
    batch, num_nodes = parents_BN.shape
    if num_nodes > MAX_NODES:
        raise ValueError(f"parents_BN has {num_nodes} nodes: at most {MAX_NODES} are allowed.")
    columns = mask_B1NK.shape[-1]
    by_node = batch, num_nodes
    check_tensor(kernels, "parents_BN", parents_BN, torch.int64, by_node, is_expanded=True)
    check_tensor(kernels, "lengths_B", lengths_B, torch.int64, (batch,))
    check_tensor(kernels, "last", last, torch.int64, ())
    check_tensor(kernels, "mask_B1NK", mask_B1NK, torch.bool, (batch, 1, num_nodes, columns))
    check_tensor(kernels, "positions_BN", positions_BN, torch.int64, by_node)
    if columns < num_nodes:
        raise ValueError(f"mask_B1NK has {columns} columns: the tree alone needs {num_nodes}.")
    arguments = np.zeros(1, MASK_ARGUMENTS)
    arguments[0] = (
        parents_BN.data_ptr(),
        parents_BN.stride(0),
        lengths_B.data_ptr(),
        last.data_ptr(),
        mask_B1NK.data_ptr(),
        positions_BN.data_ptr(),
        num_nodes,
        columns - num_nodes,
        1 << 62 if window is None else window,
    )
    threads = 32 if columns <= 128 else 128
    kernels.launch("mask.cu", (), "tree_mask", (num_nodes, 1, batch), threads, arguments)


class CacheCommit:
    """Keeps accepted nodes in a KV cache of tensors [B, H, T, head]; see kernels/cuda/commit.cu.

    Raises:
        ValueError: the tensors differ in type, shape or strides, or are not where the kernels are.
    """

    def __init__(self, kernels: Kernels, tensors: Sequence[Tensor]) -> None:
        self._kernels, first = kernels, tensors[0]
        for tensor in tensors:
            if tensor.ndim != 4 or tensor.stride(3) != 1:
                raise ValueError("a cache tensor must be [B, H, T, head], contiguous along head.")
            if (tensor.shape, tensor.stride()) != (first.shape, first.stride()):
                raise ValueError("the cache's tensors must have one shape and the same strides.")
            if (tensor.dtype, tensor.device) != (first.dtype, kernels.device):
                raise ValueError(f"the cache's tensors must be of one type, on {kernels.device}.")
        self._tensors = tuple(tensors)  # kept alive: the kernel has their addresses
        addresses = [tensor.data_ptr() for tensor in tensors]
        self._table = torch.tensor(addresses, dtype=torch.int64, device=kernels.device)
        head_bytes = first.shape[3] * first.itemsize
        steps = [stride * first.itemsize for stride in first.stride()[:3]]
        unit = next(
            (
                size
                for size in (16, 4, 2)
                if not any(n % size for n in addresses + steps + [head_bytes])
            ),
            None,
        )
        if unit is None:
            raise ValueError(
                f"a cache of {first.dtype} cannot be moved: its rows begin at odd bytes."
            )
        self._defines = (f"UNIT_BYTES={unit}",)
        self._strides = [step // unit for step in steps]
        self._head_units = head_bytes // unit

    def __call__(
        self, path_BL: Tensor, num_accepted_B: Tensor, from_B: Tensor, to_B: Tensor
    ) -> None:
        """Move column from_B + node to column to_B + i for the i-th node of each row's path.

        Args:
            path_BL: int64, nodes from the root down; see `decode.verify.Verdict`.
            num_accepted_B: int64, nodes of the path without the root.
            from_B: int64, the column where each row's tree begins.
            to_B: int64, the column after each row's last token; not behind from_B.

        Raises:
            ValueError: a tensor has the wrong device, type, shape or strides.
        """
        batch, num_heads, num_columns, _ = self._tensors[0].shape
        length = path_BL.shape[-1]
        check_tensor(self._kernels, "path_BL", path_BL, torch.int64, (batch, length))
        for name, value in (
            ("num_accepted_B", num_accepted_B),
            ("from_B", from_B),
            ("to_B", to_B),
        ):
            check_tensor(self._kernels, name, value, torch.int64, (batch,))
        arguments = np.zeros(1, COMMIT_ARGUMENTS)
        arguments[0] = (
            self._table.data_ptr(),
            *self._strides,
            path_BL.data_ptr(),
            num_accepted_B.data_ptr(),
            from_B.data_ptr(),
            to_B.data_ptr(),
            length,
            num_heads,
            self._head_units,
            num_columns,
        )
        threads = min(512, -(-num_heads * self._head_units // 32) * 32)
        grid = (len(self._tensors), 1, batch)
        self._kernels.launch("commit.cu", self._defines, "commit", grid, threads, arguments)
