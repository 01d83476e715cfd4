"""A key-value cache whose shapes never change: for steps that a CUDA graph can hold.

B rows, H key-value heads, C columns of prompts and answers, N columns of a tree, L path length.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_exp.decode.cache import empty_columns
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.step import CacheCommit
from medusa_exp.decode.verify import Verdict


class _StaticLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, C + N + 1, head size]; the last column is for waste."""

    is_sliding = False

    def __init__(self, capacity: int, num_columns: int) -> None:
        super().__init__()
        self.capacity, self.num_columns = capacity, num_columns
        self.start = 0
        """Where the next call writes; it sees all columns up to there and its own."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = empty_columns(key_states, self.num_columns)
        self.values = empty_columns(value_states, self.num_columns)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.start + key_states.shape[2]
        self.keys[:, :, self.start : stop] = key_states
        self.values[:, :, self.start : stop] = value_states
        if self.start < self.capacity:  # of prompts: a tree is written over the one before
            self.start = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.start + query_length, 0

    def get_max_length(self) -> int:
        return self.num_columns


class StaticCache(Cache):
    """Keys and values of all layers; how many tokens each row has lies on the device."""

    def __init__(
        self, num_layers: int, capacity: int, num_nodes: int, num_rows: int, device: torch.device
    ) -> None:
        """Make room for prompts and answers, and for trees of at most so many nodes."""
        super().__init__(layers=[])
        self.capacity, self.waste = capacity, capacity + num_nodes
        self.layers = [_StaticLayer(capacity, self.waste + 1) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._row_B1 = torch.arange(num_rows, device=device)[:, None]
        self._tree_start_B = torch.full_like(self.lengths_B, capacity)
        self._commits: dict[Kernels, list[CacheCommit]] = {}

    def empty(self) -> None:
        """Let the next forward calls write prompts, from the first column on."""
        self._set_start(0)

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many tokens each row has; from now on the tree's columns are written."""
        self.lengths_B.copy_(torch.tensor(lengths))
        self._set_start(self.capacity)

    def _set_start(self, column: int) -> None:
        for layer in self.layers:
            layer.start = column

    def commit(self, verdict: Verdict, is_active_B: Tensor, kernels: Kernels | None = None) -> None:
        """Move the accepted nodes of active rows to where these end: by a kernel, if there are."""
        if kernels is not None:
            if kernels not in self._commits:
                self._commits[kernels] = [CacheCommit(kernels, t) for t in self._alike()]
            to_B = torch.where(is_active_B, self.lengths_B, -1)
            for commit in self._commits[kernels]:
                commit(verdict.path_BL, verdict.num_accepted_B, self._tree_start_B, to_B)
        else:
            self._move(verdict.path_BL, is_active_B)
        self.lengths_B += (verdict.num_accepted_B + 1) * is_active_B

    def _move(self, path_BL: Tensor, is_active_B: Tensor) -> None:
        place_L = torch.arange(path_BL.shape[1], device=path_BL.device)
        from_BL = self.capacity + path_BL.clamp(min=0)
        is_kept_BL = (path_BL >= 0) & is_active_B[:, None]
        to_BL = torch.where(is_kept_BL, self.lengths_B[:, None] + place_L, self.waste)
        for states in self._tensors():
            states[self._row_B1, :, to_BL] = states[self._row_B1, :, from_BL]

    def _tensors(self) -> list[Tensor]:
        return [states for layer in self.layers for states in (layer.keys, layer.values)]

    def _alike(self) -> list[list[Tensor]]:
        """Return them by what one launch can move: some models have layers of several shapes."""
        found: dict[Hashable, list[Tensor]] = {}
        for states in self._tensors():
            found.setdefault((states.shape, states.stride(), states.dtype), []).append(states)
        return list(found.values())
