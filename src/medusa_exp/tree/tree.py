"""Draft tree: parents and ranks of its nodes; its mask, and its file.

N nodes. Node 0 is the root, the token already certain; a node at depth d holds a draft token of
head d, and its rank says which one (0 = the likeliest). Parents stand before their children.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.schemas import MOST_NODES, MOST_RANKS, Rank, TreeShape

RankPath = tuple[int, ...]
"""Ranks from the first head on: (0, 2) is the third guess of head 2 after the first of head 1."""

_Paths = Annotated[list[Annotated[list[Rank], Meta(max_length=64)]], Meta(max_length=MOST_NODES)]
"""Of a file of paths."""


@dataclass(frozen=True)
class Tree:
    """Parent and rank of every node; the root has -1 for both.

    Raises:
        ValueError: parents do not stand before children, or two siblings share a rank.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    num_picked: int | None = None
    """None: a step checks all nodes. Else the heads' probabilities pick so many of them, root
    included, anew at each step and for each row."""
    num_lookup: int = 0
    """Nodes that a step checks besides: a chain of tokens that are looked up in the text so far, in
    place of being drafted by heads (`decode/lookup.py`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", tuple(int(p) for p in self.parents))
        object.__setattr__(self, "ranks", tuple(int(r) for r in self.ranks))
        if len(self.parents) != len(self.ranks) or not self.parents:
            raise ValueError("a tree needs as many parents as ranks, and a root at least.")
        if (self.parents[0], self.ranks[0]) != (-1, -1):
            raise ValueError("node 0 is the root: its parent and rank are -1.")
        for node, (parent, rank) in enumerate(
            zip(self.parents[1:], self.ranks[1:], strict=True), 1
        ):
            if not 0 <= parent < node:
                raise ValueError(f"node {node}: parent {parent} must stand before it.")
            if not 0 <= rank < MOST_RANKS:
                raise ValueError(f"node {node}: rank {rank} is negative, or beyond any vocabulary.")
        if len(set(self.paths)) != len(self.paths):
            raise ValueError("two siblings share a rank.")
        if self.num_picked is not None and not 1 <= self.num_picked <= len(self):
            raise ValueError(f"num_picked={self.num_picked}: pick from 1 to {len(self)} nodes.")
        if not isinstance(self.num_lookup, int) or self.num_lookup < 0:
            raise ValueError(f"num_lookup={self.num_lookup} must be 0 or more, and whole.")

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> "Tree":
        """Build from paths of ranks, in the form of the reference's `medusa_choices`.

        The order of the paths does not matter; nodes come out depth first, likelier guesses
        before others, so that the likeliest path is nodes 0, 1, 2, ...

        Raises:
            ValueError: a path's prefix is not among the paths.
        """
        wanted = sorted({tuple(int(rank) for rank in path) for path in paths} - {()})
        nodes: dict[RankPath, int] = {(): 0}
        for path in wanted:
            if path[:-1] not in nodes:
                raise ValueError(f"path {list(path)} has no parent {list(path[:-1])} in the tree.")
            nodes[path] = len(nodes)
        return cls(
            (-1, *(nodes[path[:-1]] for path in wanted)), (-1, *(path[-1] for path in wanted))
        )

    @classmethod
    def load(cls, path: Path) -> "Tree":
        """Read `{"parents": [...], "ranks": [...]}`, or a list of paths as `from_paths` takes them,
        or `{"paths": [...]}`.

        Raises:
            UserError: the file is missing or holds no tree.
        """
        value = read_json(path, kind=Any)
        if value is None:
            raise UserError(
                f"{path} does not exist: stage calibrate leaves a tree.json in its run directory. "
                "Or choose tree=chain."
            )
        try:
            if isinstance(value, dict) and "paths" in value:
                value = value["paths"]
            if isinstance(value, list):
                return cls.from_paths(msgspec.convert(value, _Paths))
            found = msgspec.convert(value, TreeShape)
            return cls(tuple(found.parents), tuple(found.ranks), found.num_picked, found.num_lookup)
        except ValueError as error:
            raise UserError(
                f"{path} holds no tree: {error}. Restore it, run stage calibrate again, or choose "
                "tree=chain."
            ) from error

    def save(self, path: Path) -> None:
        """Write what `load` reads."""
        value: dict[str, Any] = {"parents": list(self.parents), "ranks": list(self.ranks)}
        if self.num_picked is not None:
            value["num_picked"] = self.num_picked
        if self.num_lookup:
            value["num_lookup"] = self.num_lookup
        write_json(path, value)

    @property
    def num_checked(self) -> int:
        """Nodes that a step checks: how many tokens the backbone is run on."""
        return (len(self) if self.num_picked is None else self.num_picked) + self.num_lookup

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> np.ndarray:
        """Return depth_N: 0 for the root, k for a guess of head k."""
        depths = np.zeros(len(self), dtype=np.int64)
        for node, parent in enumerate(self.parents[1:], 1):
            depths[node] = depths[parent] + 1
        return depths

    @property
    def depth(self) -> int:
        """The deepest node's depth: how many heads the tree uses."""
        return int(self.depths.max())

    @cached_property
    def paths(self) -> list[RankPath]:
        """Return each node's path of ranks; the root's is ()."""
        paths: list[RankPath] = [()]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            paths.append((*paths[parent], rank))
        return paths

    @cached_property
    def mask(self) -> np.ndarray:
        """Return mask_NN, True where the row's node descends from (or is) the column's."""
        mask = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            mask[node] |= mask[parent]
        return mask


def chain(num_heads: int) -> Tree:
    """The first guess of every head: one branch of `num_heads` nodes below the root."""
    return Tree(range(-1, num_heads), (-1,) + (0,) * num_heads)  # type: ignore[arg-type]
