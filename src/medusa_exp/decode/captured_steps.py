"""The captured steps of a backbone, kept from prompt to prompt: to capture one takes long."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from medusa_exp.decode.cache import FixedCache
from medusa_exp.decode.capture import GraphPool
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.cuda.runtime import MAX_NODES
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.step import CapturedStep, Observer, check_room
from medusa_exp.model.backbone import Backbone

_COLUMNS = 256
"""Capacities are multiples of it, so that prompts of many lengths share a step."""
_MAX_CACHES = 4
_Shape = tuple[int, torch.dtype]
"""Rows, and the model's dtype, which keys and values have too."""


@dataclass(eq=False)
class _Cache:
    """A cache with the steps that have been captured over it."""

    shape: _Shape
    columns: int
    """Before the tree's."""
    cache: FixedCache
    steps: dict[Hashable, CapturedStep] = field(default_factory=dict)
    is_lent: bool = False
    """Is an answer in it that has not ended?"""


class CapturedSteps:
    """The captured steps of a backbone, kept with the caches that they are captured over.

    Steps of as many rows and columns share a cache, unless an answer is in it that has not ended;
    all share one pool of memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        observer: Observer,
        layers: CompiledLayers | None,
    ) -> None:
        self.backbone, self.observer, self.layers = backbone, observer, layers
        self._caches: list[_Cache] = []
        self._pool = GraphPool(backbone.device)

    @contextmanager
    def lent(
        self, drafter: Drafter, rule: AcceptanceRule, num_rows: int, length: int
    ) -> Iterator[CapturedStep]:
        """Lend a step over an empty cache, for prompts and responses of this length together.

        Answers that are given side by side have caches of their own.
        """
        check_room(drafter)
        key = (drafter.key, rule)
        columns = -(-length // _COLUMNS) * _COLUMNS
        shape = num_rows, self.backbone.model.dtype
        cache = self._fitting(shape, columns, key) or self._made(shape, columns)
        if key not in cache.steps:
            cache.steps[key] = CapturedStep(
                self.backbone,
                drafter,
                rule,
                cache.cache,
                pool=self._pool,
                layers=self.layers,
                observer=self.observer,
            )
        step = cache.steps[key]
        # Whatever moves weights meanwhile, what this step reads is there until it has ended.
        read = [weight.data for weight in self.backbone.model.parameters()]  # noqa: F841
        step.check_weights()
        step.cache.empty()
        step.verifier.restart()
        cache.is_lent = True
        try:
            yield step
        finally:
            cache.is_lent = False
            self._drop(len(self._caches) - _MAX_CACHES)

    def _fitting(self, shape: _Shape, columns: int, key: Hashable) -> _Cache | None:
        """Return a cache that is not lent and not far too large; one with this step, if any.

        Attention reads all columns, so that a far larger one would cost more than a capture.
        """
        fitting = [
            cache
            for cache in self._caches
            if not cache.is_lent
            and cache.shape == shape
            and columns <= cache.columns <= 2 * columns
        ]
        return min(fitting, key=lambda c: (key not in c.steps, c.columns), default=None)

    def _made(self, shape: _Shape, columns: int) -> _Cache:
        self._drop(len(self._caches) + 1 - _MAX_CACHES)
        backbone = self.backbone
        cache = FixedCache(backbone.num_layers, columns, MAX_NODES, shape[0], backbone.device)
        self._caches.append(_Cache(shape, columns, cache))
        return self._caches[-1]

    def _drop(self, count: int) -> None:
        """Drop so many of the oldest caches, with their steps; none that is lent."""
        for cache in [cache for cache in self._caches if not cache.is_lent][: max(0, count)]:
            self._caches.remove(cache)
