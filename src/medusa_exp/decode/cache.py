"""KV caches in which each row keeps the accepted nodes of its tree, and no others.

Every row has its tokens in the first columns, a column a position. A tree is written behind the
longest row, for all rows in the same columns; `commit` moves what is accepted to its row's end.
`GrowingCache` knows the lengths of rows on the host. The shapes of `FixedCache` never change, and
lengths lie on the device: a CUDA graph can hold a step over it.

B rows, H key-value heads, T columns, C columns of prompts and responses, N columns of a tree, L
path length.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_exp.decode.cuda.mask_and_commit import CacheCommit
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.verify import Verdict


class _Layer(CacheLayerMixin):
    """One layer's keys and values [B, H, num_columns, head size], made at the first call.

    Calls that begin before column `capacity` advance; a later one is overwritten by the next.
    """

    is_sliding = False

    def __init__(self, num_columns: int, capacity: int, num_spare: int = 0) -> None:
        super().__init__()
        self.num_columns, self.capacity, self._num_spare = num_columns, capacity, num_spare
        self.start = 0
        """Where the next call writes; it sees all columns up to there and its own."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._make(key_states, value_states, len(key_states))

    def allocate(self, like: "_Layer", num_rows: int) -> None:
        """Make room for so many rows of such keys and values as another layer holds."""
        self._make(like.keys, like.values, num_rows)

    def _make(self, keys: Tensor, values: Tensor, num_rows: int) -> None:
        # Zeros: a column of no row is masked, but 0 x NaN would not be.
        columns = self.num_columns + self._num_spare
        self.keys, self.values = (
            states.new_zeros(num_rows, states.shape[1], columns, states.shape[3])[
                :, :, : self.num_columns
            ]
            for states in (keys, values)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.start + key_states.shape[2]
        assert stop <= self.num_columns, "the cache is smaller than the decoding loop thinks"
        self.keys[:, :, self.start : stop] = key_states
        self.values[:, :, self.start : stop] = value_states
        if self.start < self.capacity:
            self.start = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.start + query_length, 0

    def get_max_length(self) -> int:
        return self.num_columns

    def put(self, rows_R: Tensor, other: "_Layer", num_columns: int) -> None:
        """Replace what is in some rows by the first columns of another layer's rows."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[rows_R, :, :num_columns] = theirs[:, :, :num_columns]
            # A NaN that the row's last prompt left would be one of this prompt too.
            mine[:, :, num_columns:].index_fill_(0, rows_R, 0)

    def move(self, rows_R: Tensor, to_R: Tensor) -> None:
        """Copy rows to where other rows are."""
        for states in (self.keys, self.values):
            states[to_R] = states[rows_R]


class GrowingCache(Cache):
    """Keys and values of all layers, and how many tokens each row has in them.

    Sliding-window layers keep every column too: a window is the attention mask's business here.
    """

    def __init__(self, num_layers: int, capacity: int, num_rows: int) -> None:
        super().__init__(layers=[_Layer(capacity, capacity) for _ in range(num_layers)])
        self.lengths = [0] * num_rows

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many tokens each row has; columns behind the longest row are free again."""
        self.lengths = lengths
        for layer in self.layers:
            layer.start = max(lengths)

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

    def allocate(self, like: Cache) -> None:
        """Make room at once for such keys and values as another cache holds."""
        _allocate(self, like, len(self.lengths))

    def put(self, rows: list[int], prompts: "GrowingCache") -> None:
        """Replace what is in some rows by the rows of another cache."""
        self.allocate(prompts)
        _put(self, rows, prompts)
        lengths = list(self.lengths)
        for row, length in zip(rows, prompts.lengths, strict=True):
            lengths[row] = length
        self.set_lengths(lengths)

    def forget(self, row: int) -> None:
        """Say that a row has no tokens."""
        self.set_lengths([0 if number == row else n for number, n in enumerate(self.lengths)])

    def shrink(self, num_rows: int, rows: list[int], to: list[int]) -> None:
        """Copy rows to where others are, and drop all behind the first so many, without a copy."""
        lengths = list(self.lengths)
        for row, place in zip(rows, to, strict=True):
            lengths[place] = lengths[row]
        _move(self, rows, to)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:num_rows], layer.values[:num_rows]
        self.set_lengths(lengths[:num_rows])

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows)
        for layer in self.layers:
            index = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.set_lengths([self.lengths[row] for row in rows])


class FixedCache(Cache):
    """Keys and values of all layers; how many tokens each row has lies on the device."""

    def __init__(
        self, num_layers: int, capacity: int, num_nodes: int, num_rows: int, device: torch.device
    ) -> None:
        """Make room for prompts and answers, and for trees of at most so many nodes."""
        super().__init__(layers=[])
        self.capacity, self.tree_end = capacity, capacity + num_nodes
        # One column more, behind the tree's: what nobody keeps is moved there. And one that is in
        # no cache: all have gaps between their rows then, as those have that lie in another's
        # memory. Else torch would compile a layer once for each of the two.
        self.layers = [_Layer(self.tree_end + 1, capacity, 1) for _ in range(num_layers)]
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

    def view(self, num_rows: int, capacity: int, num_nodes: int) -> "FixedCache":
        """Return a smaller cache in the memory of this one; both have the same first columns."""
        part = FixedCache(
            len(self.layers), capacity, num_nodes, num_rows, device=self.lengths_B.device
        )
        for mine, theirs in zip(self.layers, part.layers, strict=True):
            assert mine.is_initialized and theirs.num_columns <= mine.num_columns
            theirs.keys, theirs.values = (
                states[:num_rows, :, : theirs.num_columns] for states in (mine.keys, mine.values)
            )
            theirs.is_initialized = True
        part._set_start(capacity)
        return part

    @torch.inference_mode()  # as at a first call: else compiled layers would be compiled anew
    def allocate(self, like: GrowingCache) -> None:
        """Make room at once for such keys and values as another cache holds."""
        _allocate(self, like, len(self.lengths_B))

    def put(self, rows: list[int], prompts: GrowingCache) -> None:
        """Replace what is in some rows by the rows of another cache."""
        _put(self, rows, prompts)
        device = self.lengths_B.device
        self.lengths_B[torch.tensor(rows, device=device)] = torch.tensor(
            prompts.lengths, device=device
        )

    def move(self, rows: list[int], to: list[int]) -> None:
        """Copy keys and values of rows to where others are."""
        _move(self, rows, to)

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
        to_BL = torch.where(is_kept_BL, self.lengths_B[:, None] + place_L, self.tree_end)
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


def _allocate(cache: Cache, like: Cache, num_rows: int) -> None:
    for mine, theirs in zip(cache.layers, like.layers, strict=True):
        if not mine.is_initialized:
            mine.allocate(theirs, num_rows)


def _put(cache: Cache, rows: list[int], prompts: GrowingCache) -> None:
    rows_R = torch.tensor(rows)
    for mine, theirs in zip(cache.layers, prompts.layers, strict=True):
        rows_R = rows_R.to(mine.keys.device)  # a model may be spread over several; else sent once
        mine.put(rows_R, theirs, max(prompts.lengths))


def _move(cache: Cache, rows: list[int], to: list[int]) -> None:
    places_2R = torch.tensor([rows, to])
    for layer in cache.layers if rows else ():
        places_2R = places_2R.to(layer.keys.device)
        layer.move(*places_2R)


def copy_of(cache: Cache, rows: list[int], lengths: list[int], num_columns: int) -> GrowingCache:
    """Return a cache of the first tokens of some rows of one, with room for so many columns."""
    copy = GrowingCache(len(cache.layers), num_columns, len(rows))
    _allocate(copy, cache, len(rows))
    index = torch.tensor(rows)
    for mine, theirs in zip(copy.layers, cache.layers, strict=True):
        index = index.to(theirs.keys.device)
        for to, states in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            to[:, :, : max(lengths)] = states[index, :, : max(lengths)]
    copy.set_lengths(lengths)
    return copy
