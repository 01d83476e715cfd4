"""The steps that slots take: eager ones, or captured ones of few sizes over one cache's memory.

`decode/slots.py` says which request is in which row and when prompts are run; here is what makes a
step of the size that it asks for, and moves rows when the size changes. Captured steps have fixed
shapes for each of few sizes (the batch shrinks by halves), eager ones shrink row by row.

B rows, R rows among them, N nodes of a draft tree, D hidden.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from medusa_exp.decode.cache import FixedCache
from medusa_exp.decode.capture import GraphPool
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.memory import one_column
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.step import (
    CapturedStep,
    EagerStep,
    Observer,
    Step,
    check_room,
)
from medusa_exp.model.backbone import Backbone

_COLUMNS = 256
"""Fewest columns of a captured step."""


class StepSource(Protocol):
    """Makes the steps that `Slots` takes."""

    backbone: Backbone
    drafter: Drafter
    rule: AcceptanceRule
    observer: Observer
    num_columns: int
    """Most that a request may have."""
    layers: CompiledLayers | None
    """Of the backbone, compiled; None runs them as they are."""

    def num_rows(self, count: int) -> int:
        """Return the rows of the smallest step for so many requests."""
        ...

    def fit(
        self, step: Step | None, num_rows: int, num_columns: int, rows: list[int], to: list[int]
    ) -> Step:
        """Return a step of that size; some rows of the one before have moved to others."""
        ...

    def free(self, step: Step, row: int) -> None:
        """Forget what is in a row."""
        ...

    def prepare(self) -> None:
        """Make the steps for requests of the most columns now, where that takes long."""
        ...


class EagerSlots:
    """A `StepSource` of eager steps: the batch is as large as there are requests."""

    layers: CompiledLayers | None = None

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter,
        rule: AcceptanceRule,
        num_columns: int,
        observer: Observer,
    ) -> None:
        self.backbone, self.drafter, self.rule = backbone, drafter, rule
        self.num_columns, self.observer = num_columns, observer

    def num_rows(self, count: int) -> int:
        return count

    def fit(
        self, step: Step | None, num_rows: int, num_columns: int, rows: list[int], to: list[int]
    ) -> Step:
        if step is None:
            return EagerStep(
                self.backbone, self.drafter, self.rule, num_rows, self.num_columns, self.observer
            )
        if num_rows < len(step.root_B):
            step.cache.shrink(num_rows, rows, to)
            _move((step.root_B, step.hidden_BD), rows, to)
            step.root_B, step.hidden_BD = step.root_B[:num_rows], step.hidden_BD[:num_rows]
        return step

    def free(self, step: Step, row: int) -> None:
        step.cache.forget(row)

    def prepare(self) -> None:
        """Nothing is to be made."""


class CapturedSlots:
    """A `StepSource` of captured steps of few sizes, over parts of the memory of one cache.

    Kept from stream to stream, because a capture takes the time of many steps.
    """

    def __init__(
        self,
        backbone: Backbone,
        observer: Observer,
        layers: CompiledLayers | None,
    ) -> None:
        self.backbone, self.observer, self.layers = backbone, observer, layers
        self._base: FixedCache | None = None
        self._steps: dict[Hashable, CapturedStep] = {}
        self._pool = GraphPool(backbone.device)

    def open(
        self, drafter: Drafter, rule: AcceptanceRule, num_slots: int, num_columns: int
    ) -> "CapturedSlots":
        """Make room for so many requests of at most so many tokens; return what has it."""
        check_room(drafter)
        self.drafter, self.rule = drafter, rule
        self.num_slots, self.num_columns = num_slots, -(-num_columns // _COLUMNS) * _COLUMNS
        base, nodes = self._base, drafter.num_nodes
        for step in self._steps.values():
            step.check_weights()
        if base is None or not (
            len(base.lengths_B) >= num_slots and base.tree_end >= self.num_columns + nodes
        ):
            self._base, self._steps = None, {}  # before there is another
            self._base = FixedCache(
                self.backbone.num_layers, self.num_columns, nodes, num_slots, self.backbone.device
            )
            self._base.allocate(one_column(self.backbone))
        return self

    def num_rows(self, count: int) -> int:
        return min(rows for rows in self._sizes() if rows >= count)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture the steps of all numbers of rows."""
        for num_rows in self._sizes():
            step = self._get(num_rows, self.num_columns)
            step.activate([])
            step.prepare()

    def _sizes(self) -> list[int]:
        sizes = halves(self.num_slots)
        # A batch of one row would be compiled anew: not for the last response of a stream.
        return sizes[:-1] if self.layers and len(sizes) > 1 else sizes

    def fit(
        self, step: Step | None, num_rows: int, num_columns: int, rows: list[int], to: list[int]
    ) -> Step:
        other = self._get(num_rows, num_columns)
        other.is_at_work = False  # what a closed generator left comes first in the device's stream
        if step is not None and other is not step:
            assert isinstance(step, CapturedStep) and self._base is not None
            self._base.move(rows, to)
            _move((step.root_B, step.hidden_BD, step.cache.lengths_B), rows, to)
            other.root_B.copy_(step.root_B[:num_rows])
            other.hidden_BD.copy_(step.hidden_BD[:num_rows])
            other.cache.lengths_B.copy_(step.cache.lengths_B[:num_rows])
            other.last.copy_(step.last)
        return other

    def free(self, step: Step, row: int) -> None:
        """Leave what is in a row: no other row looks there."""

    def _get(self, num_rows: int, num_columns: int) -> CapturedStep:
        backbone, drafter, rule, base = self.backbone, self.drafter, self.rule, self._base
        assert base is not None
        columns = min(bucket(num_columns), self.num_columns)
        key = (num_rows, columns, drafter.key, rule)
        if key not in self._steps:
            cache = base.view(num_rows, columns, drafter.num_nodes)
            self._steps[key] = CapturedStep(
                backbone,
                drafter,
                rule,
                cache,
                pool=self._pool,
                layers=self.layers,
                observer=self.observer,
            )
            if rule.name == "sampling":
                self._steps[key].verifier.uniforms_BN = torch.zeros(
                    num_rows, drafter.num_uniforms, device=backbone.device
                )
        return self._steps[key]


def halves(number: int) -> list[int]:
    """Return a number, its half, and so on down to 1, rounded up."""
    found = [number]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def bucket(length: int) -> int:
    """Return the columns for requests of a length: 256, 384, 512, 768, 1024 and so on."""
    columns = _COLUMNS
    while columns < length:
        columns = columns * 3 // 2 if columns & (columns - 1) == 0 else columns // 3 * 4
    return columns


def _move(tensors: Sequence[Tensor], rows: list[int], to: list[int]) -> None:
    to_R, rows_R = torch.tensor([to, rows], device=tensors[0].device)
    for tensor in tensors if rows else ():
        tensor[to_R] = tensor[rows_R]
