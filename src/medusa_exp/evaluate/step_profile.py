"""Where the time of tree decoding goes: prompts, backbone, heads and all that is between.

The decoder tells an observer when each part of a step begins and ends (`decode.step.Observer`), so
that what is timed is the code that decodes. Steps that run op by op are timed by the host's clock,
and on a GPU each part is waited for. A captured step has no host between its parts: there CUDA
events that are captured with it time them, and what the device does not do in that time is rest.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from medusa_exp.decode.decoder import Decoder
from medusa_exp.runs.machine import synchronize
from medusa_exp.runs.metric_table import PARTS_OF_TIME

log = logging.getLogger(__name__)

BACKBONES = ("prompt", "backbone")


def shares_of_time(decoder: Decoder, prompts: list[list[int]]) -> dict[str, float]:
    """Return the share (0..1) of each of PARTS_OF_TIME in decoding over the decoder's tree.

    They sum to 1. The prompts are decoded one by one.

    Where events cannot be captured, steps on a GPU run op by op for this, and a warning says so:
    what lies outside the backbone then takes more than in captured steps, and its share is an upper
    bound.
    """
    try:
        return _shares(decoder, prompts, decoder.uses_fixed_shapes)
    except (RuntimeError, TypeError) as error:
        if decoder.backbone.device.type != "cuda" or not decoder.uses_fixed_shapes:
            raise
        log.warning("eval/time/*: steps are timed op by op, not captured (%s)", error)
        return _shares(decoder, prompts, False)


def _shares(
    decoder: Decoder, prompts: list[list[int]], uses_fixed_shapes: bool
) -> dict[str, float]:
    watch = Stopwatch(decoder.backbone.device)
    observed = decoder.observed(watch, cuda_graph=uses_fixed_shapes)
    if uses_fixed_shapes:  # steps are captured now, and replayed below
        for prompt in prompts:
            observed.decode([prompt])
        watch.restart()
    with watch.part("rest"):
        for prompt in prompts:
            observed.decode([prompt])
    total = sum(watch.seconds.values())
    return {part: watch.seconds[part] / total for part in PARTS_OF_TIME}


class Stopwatch:
    """Adds up the seconds of parts; while one runs inside another, the outer one's clock stands.

    An observer: see `decode.step.Observer`.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []
        """Events of the capture under way, and the part that ends at each; None ends nothing."""
        self._marks_of: dict[Hashable, list[tuple[str | None, torch.cuda.Event]]] = {}

    def restart(self) -> None:
        """Forget the seconds so far."""
        self.seconds.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def captured(self, graph: torch.cuda.CUDAGraph) -> None:
        """Keep the events that are in this graph."""
        self._marks_of[graph], self._marks = self._marks, []

    def replayed(self, graph: torch.cuda.CUDAGraph) -> None:
        """Add what the device took for each part; the host's clock, outside, counted it as rest."""
        marks = self._marks_of[graph]
        for (_, before), (part, after) in pairwise(marks):
            if part is not None:
                seconds = before.elapsed_time(after) / 1000
                self.seconds[part] += seconds
                self.seconds["rest"] -= seconds

    def _lap(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record()
            self._marks.append((self._part_in_capture(), event))
            return
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _part_in_capture(self) -> str | None:
        """Return the part that is open; "rest", which is opened outside of captures, is none."""
        return self._open[-1] if self._open and self._open[-1] != "rest" else None
