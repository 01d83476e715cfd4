"""Where the time of tree decoding goes: prompts, backbone, heads and all that is between."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.drafting import DynamicTreeDrafter, FixedTreeDrafter, SequentialDrafter
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import Verifier
from medusa_exp.evaluate.methods import Method, synchronize
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import PrefixAttention
from medusa_exp.runs.metric_table import PARTS_OF_TIME

BACKBONES = ("prompt", "backbone")

_PLACES: dict[str, list[tuple[type, str]]] = {
    "heads": [
        (FixedTreeDrafter, "__call__"),
        (DynamicTreeDrafter, "__call__"),
        (SequentialDrafter, "__call__"),
        (PrefixAttention, "forward"),
    ],
    "mask": [(StepMask, "at")],
    "verification": [(Verifier, "__call__"), (Verifier, "next_token")],
    "cache": [(GrowingCache, "commit"), (GrowingCache, "keep_rows")],
}
"""Part -> the methods, as (class, name), whose time it is."""


def shares_of_time(
    backbone: Backbone, method: Method, prompts: list[list[int]]
) -> dict[str, float]:
    """Return the share (0..1) of each of PARTS_OF_TIME in a method's time; they sum to 1.

    The method answers the prompts one by one while the methods in _PLACES are timed in place.

    On a GPU steps run op by op for this, and each part is waited for: what lies outside the
    backbone then takes more than in captured steps, and its share is an upper bound.
    """
    watch = _Stopwatch(backbone.device)

    # A pass over a prompt leaves its positions to the backbone; one over a tree has to name them.
    def forward(self: Backbone, *arguments: Any, **options: Any) -> Any:
        with watch.part("prompt" if options.get("position_ids_BN") is None else "backbone"):
            return plain_forward(self, *arguments, **options)

    plain_forward = Backbone.forward
    with ExitStack() as patches:
        patches.enter_context(patch.object(backbone, "decodes_statically", False))
        patches.enter_context(patch.object(Backbone, "forward", forward))
        for part, places in _PLACES.items():
            for owner, name in places:
                timed = watch.timing(part, getattr(owner, name))
                patches.enter_context(patch.object(owner, name, timed))
        with watch.part("rest"):
            for prompt in prompts:
                method([prompt])
    total = sum(watch.seconds.values())
    return {part: watch.seconds[part] / total for part in PARTS_OF_TIME}


class _Stopwatch:
    """Adds up the seconds of parts; while one runs inside another, the outer one's clock stands."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed

    def _lap(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
