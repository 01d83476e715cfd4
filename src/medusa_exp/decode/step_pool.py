"""The static steps of a backbone, kept from prompt to prompt: a capture takes many steps' time."""

from collections.abc import Hashable
from typing import Any

import torch

from medusa_exp.decode.cuda.runtime import MAX_NODES
from medusa_exp.decode.draft import Proposer
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import Judge, Rule
from medusa_exp.decode.static_cache import StaticCache
from medusa_exp.decode.static_step import StaticStep
from medusa_exp.decode.verifier import step_kernels
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone

_COLUMNS = 256
"""Capacities are multiples of it, so that prompts of many lengths share a step."""
_MAX_CACHES = 4

_Shape = tuple[int, int]
"""Rows, and columns before the tree's."""


class StaticSteps:
    """Makes a step for rows and a length once.

    Steps of as many rows and columns share a cache, and all share one pool of memory: one runs at
    a time.
    """

    def __init__(self) -> None:
        self._caches: dict[_Shape, StaticCache] = {}
        self._steps: dict[tuple[_Shape, Hashable], StaticStep] = {}
        self._pool: Any = None

    def get(
        self, backbone: Backbone, propose: Proposer, rule: Rule, num_rows: int, length: int
    ) -> StaticStep:
        """Return a step over an empty cache, for prompts and answers of this length together."""
        if propose.num_nodes > MAX_NODES:
            raise UserError(
                f"the tree has {propose.num_nodes} nodes, and a captured step has room for "
                f"{MAX_NODES}: take a smaller tree, or set decode.cuda_graph=false."
            )
        if self._pool is None and backbone.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        shape = self._shape(num_rows, length)
        if shape not in self._caches:
            self._make_room()
            self._caches[shape] = StaticCache(
                backbone.num_layers, shape[1], MAX_NODES, num_rows, backbone.device
            )
        key = (shape, (propose.key, rule, backbone.model.dtype))
        if key not in self._steps:
            self._steps[key] = StaticStep(
                backbone,
                propose,
                Judge(rule, backbone.device),
                self._caches[shape],
                StepMask(
                    backbone.model,
                    shape[1] + MAX_NODES,
                    keeps_full=propose.prefix is not None,
                ),
                kernels=step_kernels(rule.verifier, backbone.device),
                pool=self._pool,
            )
        step = self._steps[key]
        step.cache.empty()
        step.judge.restart()
        return step

    def _shape(self, num_rows: int, length: int) -> _Shape:
        """Return the rows and columns of a cache that is there and not far too large, or of a new.

        Attention reads all columns, so that a far larger one would cost more than a capture.
        """
        columns = -(-length // _COLUMNS) * _COLUMNS
        fitting = [s for s in self._caches if s[0] == num_rows and columns <= s[1] <= 2 * columns]
        return min(fitting, default=(num_rows, columns))

    def _make_room(self) -> None:
        """Forget the oldest cache, and the steps on it, where there are many."""
        if len(self._caches) < _MAX_CACHES:
            return
        oldest = next(iter(self._caches))
        del self._caches[oldest]
        self._steps = {key: step for key, step in self._steps.items() if key[0] != oldest}
