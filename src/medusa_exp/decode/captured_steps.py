"""The captured steps of a backbone, kept from prompt to prompt: to capture one takes long."""

from collections.abc import Hashable
from typing import Any

import torch

from medusa_exp.decode.cache import FixedCache
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.cuda.runtime import MAX_NODES
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import AcceptanceRule, Verifier, step_kernels
from medusa_exp.decode.step import UNOBSERVED, CapturedStep, Observer, check_room
from medusa_exp.model.backbone import Backbone

_COLUMNS = 256
"""Capacities are multiples of it, so that prompts of many lengths share a step."""
_MAX_CACHES = 4
_Shape = tuple[int, int]
"""Rows, and columns before the tree's."""


class CapturedSteps:
    """The captured steps of a backbone, each made once.

    Steps of as many rows and columns share a cache, and all share one pool of memory: one runs at
    a time.
    """

    def __init__(
        self,
        backbone: Backbone,
        observer: Observer = UNOBSERVED,
        layers: CompiledLayers | None = None,
    ) -> None:
        self.backbone, self.observer, self.layers = backbone, observer, layers
        self._caches: dict[_Shape, FixedCache] = {}
        self._steps: dict[tuple[_Shape, Hashable], CapturedStep] = {}
        self._pool: Any = None

    def get(
        self, drafter: Drafter, rule: AcceptanceRule, num_rows: int, length: int
    ) -> CapturedStep:
        """Return a step over an empty cache, for prompts and responses of this length together."""
        check_room(drafter)
        backbone = self.backbone
        if self._pool is None and backbone.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        shape = self._shape(num_rows, length)
        if shape not in self._caches:
            self._make_room()
            self._caches[shape] = FixedCache(
                backbone.num_layers, shape[1], MAX_NODES, num_rows, backbone.device
            )
        key = (shape, (drafter.key, rule, backbone.model.dtype))
        if key not in self._steps:
            is_prefixed = drafter.prefix is not None
            self._steps[key] = CapturedStep(
                backbone,
                drafter,
                Verifier(rule, backbone.device),
                self._caches[shape],
                StepMask(backbone.model, shape[1] + MAX_NODES, keeps_full=is_prefixed),
                kernels=step_kernels(rule.verifier, backbone.device),
                pool=self._pool,
                layers=self.layers,
                observer=self.observer,
            )
        step = self._steps[key]
        step.cache.empty()
        step.verifier.restart()
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
