"""A key-value cache of fixed size that keeps the accepted rows of a tree in place.

B batch, H key-value heads, T positions, N tree nodes, L accepted nodes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, max_length, head size], of which `length` are in use."""

    is_sliding = False

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(states: Tensor) -> Tensor:
            return states.new_empty(*states.shape[:2], self.max_length, states.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        assert self.length <= self.max_length, "the cache is smaller than the decoding loop thinks"
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length


class TreeCache(Cache):
    """Keys and values of all layers.

    Sliding-window layers keep every row too: a window is the attention mask's business here.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        super().__init__(layers=[_PreallocatedLayer(max_length) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Rows in use."""
        return self.layers[0].length

    def commit(self, start: int, path: list[int]) -> None:
        """Keep, of the rows from `start` on, those of the nodes in `path`, and drop the others.

        Args:
            start: the row of the tree's root.
            path: increasing node numbers L; the first is 0, the root.
        """
        moves = path != list(range(len(path)))
        rows_L = torch.tensor(path, device=self.layers[0].keys.device) + start if moves else None
        for layer in self.layers:
            if rows_L is not None:
                for states in (layer.keys, layer.values):
                    kept = states.index_select(2, rows_L)
                    states[:, :, start : start + len(path)] = kept
            layer.length = start + len(path)
