"""The captured steps of a backbone, kept from prompt to prompt: to capture one takes long."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from medusa_exp.decode.cache import FixedCache
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.cuda.runtime import MAX_NODES
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import AcceptanceRule, Verifier, step_kernels
from medusa_exp.decode.step import UNOBSERVED, CapturedStep, GraphPool, Observer, check_room
from medusa_exp.model.backbone import Backbone

_COLUMNS = 256
"""Capacities are multiples of it, so that prompts of many lengths share a step."""
_MAX_CACHES = 4


@dataclass(eq=False)
class _Cache:
    """A cache with the steps that have been captured over it."""

    num_rows: int
    columns: int
    """Before the tree's."""
    cache: FixedCache
    steps: dict[Hashable, CapturedStep] = field(default_factory=dict)
    is_used: bool = False
    """Is an answer in it that has not ended?"""


class CapturedSteps:
    """The captured steps of a backbone, each made once.

    Steps of as many rows and columns share a cache, unless it is in use, and all share one pool of
    memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        observer: Observer = UNOBSERVED,
        layers: CompiledLayers | None = None,
    ) -> None:
        self.backbone, self.observer, self.layers = backbone, observer, layers
        self._caches: list[_Cache] = []
        self._pool = GraphPool()

    @contextmanager
    def used(
        self, drafter: Drafter, rule: AcceptanceRule, num_rows: int, length: int
    ) -> Iterator[CapturedStep]:
        """Lend a step over an empty cache, for prompts and responses of this length together.

        Answers that are given side by side have caches of their own.
        """
        check_room(drafter)
        lent = self._free(num_rows, length)
        step = self._step(lent, drafter, rule)
        step.cache.empty()
        step.verifier.restart()
        lent.is_used = True
        try:
            yield step
        finally:
            lent.is_used = False

    def _step(self, lent: _Cache, drafter: Drafter, rule: AcceptanceRule) -> CapturedStep:
        backbone = self.backbone
        key = (drafter.key, rule, backbone.model.dtype)
        if key not in lent.steps:
            is_prefixed = drafter.prefix is not None
            lent.steps[key] = CapturedStep(
                backbone,
                drafter,
                Verifier(rule, backbone.device),
                lent.cache,
                StepMask(backbone.model, lent.columns + MAX_NODES, keeps_full=is_prefixed),
                kernels=step_kernels(rule.verifier, backbone.device),
                pool=self._pool,
                layers=self.layers,
                observer=self.observer,
            )
        return lent.steps[key]

    def _free(self, num_rows: int, length: int) -> _Cache:
        """Return a cache that is free and not far too large, or a new one.

        Attention reads all columns, so that a far larger one would cost more than a capture.
        """
        columns = -(-length // _COLUMNS) * _COLUMNS
        free = [one for one in self._caches if not one.is_used]
        fitting = [
            o for o in free if o.num_rows == num_rows and columns <= o.columns <= 2 * columns
        ]
        if fitting:
            return min(fitting, key=lambda one: one.columns)
        while free and len(self._caches) >= _MAX_CACHES:
            self._caches.remove(free.pop(0))  # the oldest, with its steps
        backbone = self.backbone
        cache = FixedCache(backbone.num_layers, columns, MAX_NODES, num_rows, backbone.device)
        self._caches.append(_Cache(num_rows, columns, cache))
        return self._caches[-1]
