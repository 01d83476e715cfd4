"""A key-value cache of fixed size that keeps the accepted nodes of each row's tree in place.

B rows, H key-value heads, T columns, N tree nodes. Every row has its tokens in the first columns, a
column a position. A tree is written behind the longest row, for all rows in the same columns; what
is accepted then moves to where its row ends.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


def empty_columns(states: Tensor, num_columns: int) -> Tensor:
    """Return room for as many columns of keys or values as these [B, H, T, head size]."""
    # Zeros: a column of no row is masked, but 0 x NaN would not be.
    return states.new_zeros(*states.shape[:2], num_columns, states.shape[3])


class _PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, capacity, head size], of which `length` are in use."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = empty_columns(key_states, self.capacity)
        self.values = empty_columns(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        assert self.length <= self.capacity, "the cache is smaller than the decoding loop thinks"
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity


class TreeCache(Cache):
    """Keys and values of all layers, and how many tokens each row has in them.

    Sliding-window layers keep every column too: a window is the attention mask's business here.
    """

    def __init__(self, num_layers: int, capacity: int, num_rows: int) -> None:
        super().__init__(layers=[_PreallocatedLayer(capacity) for _ in range(num_layers)])
        self.lengths = [0] * num_rows

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many tokens each row has; columns behind the longest row are free again."""
        self.lengths = lengths
        for layer in self.layers:
            layer.length = max(lengths)

    def commit(self, paths: list[list[int]]) -> None:
        """Keep the accepted nodes of the tree that was last written, and drop the others.

        Args:
            paths: increasing node numbers of each row; the first is 0, the root.
        """
        root = max(self.lengths)
        moves = [
            (row, root + node, length + place)
            for row, (path, length) in enumerate(zip(paths, self.lengths, strict=True))
            for place, node in enumerate(path)
            if root + node != length + place
        ]
        if moves:
            moves_M3 = torch.tensor(moves)
            for layer in self.layers:  # each on its device: a model may be spread over several
                moves_M3 = moves_M3.to(layer.keys.device)
                rows_M, from_M, to_M = moves_M3.unbind(1)
                for states in (layer.keys, layer.values):
                    states[rows_M, :, to_M] = states[rows_M, :, from_M]
        self.set_lengths([n + len(path) for n, path in zip(self.lengths, paths, strict=True)])

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows)
        for layer in self.layers:
            index = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.set_lengths([self.lengths[row] for row in rows])
