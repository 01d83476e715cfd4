"""Where the time of decoding goes: prompts, backbone, heads and all that is between.

The decoder tells an observer when each part of a step begins and ends (`decode.step.Observer`), so
that what is timed is the code that decodes, over the tree and plainly. Steps that run op by op are
timed by the host's clock, and on a GPU each part is waited for. A captured step has no host between
its parts: there CUDA events that are captured with it time them, and what the device does not do in
that time is rest.
"""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Responses
from medusa_exp.decode.rule import GREEDY
from medusa_exp.decode.step import Observer
from medusa_exp.runs.machine import synchronize
from medusa_exp.runs.metric_table import PARTS_OF_TIME

log = logging.getLogger(__name__)

BACKBONES = ("prompt", "backbone")


@dataclass
class Profile:
    """Where the seconds of one way of decoding went, by PARTS_OF_TIME, prompts answered in turn."""

    tokens: int = 0
    prompts: int = 0
    steps: int = 0
    """Those of the prompts included."""
    of_prompts: Counter[str] = field(default_factory=Counter)
    """Seconds until the first token of each response."""
    of_steps: Counter[str] = field(default_factory=Counter)
    """Seconds of all later steps."""

    def shares(self) -> dict[str, float]:
        """Return the share (0..1) of each of PARTS_OF_TIME; they sum to 1."""
        total = self.of_prompts.total() + self.of_steps.total()
        return {
            part: (self.of_prompts[part] + self.of_steps[part]) / total for part in PARTS_OF_TIME
        }

    def of_a_step(self) -> dict[str, float]:
        """Return the seconds of each part in a step after the prompt's; zeros where none was."""
        later = max(1, self.steps - self.prompts)
        return {part: self.of_steps[part] / later for part in PARTS_OF_TIME}


def profile(
    decoder: Decoder, prompts: list[list[int]], *, seconds: float = math.inf
) -> tuple[Profile, Profile]:
    """Return where the time of decoding goes, over the decoder's tree and plainly.

    The prompts are decoded one by one, each in both ways, until so many `seconds` have passed: at
    least one is.

    Where events cannot be captured, steps on a GPU run op by op for this, and a warning says so:
    what lies outside the backbone then takes more than in captured steps, and its share is an upper
    bound.
    """
    try:
        return _profile(decoder, prompts, seconds, decoder.uses_fixed_shapes)
    except (RuntimeError, TypeError) as error:
        if decoder.backbone.device.type != "cuda" or not decoder.uses_fixed_shapes:
            raise
        log.warning("eval/time/*: steps are timed op by op, not captured (%s)", error)
        return _profile(decoder, prompts, seconds, False)


def _profile(
    decoder: Decoder, prompts: list[list[int]], seconds: float, uses_fixed_shapes: bool
) -> tuple[Profile, Profile]:
    watch = Stopwatch(decoder.backbone.device)
    observed = decoder.observed(watch, cuda_graph=uses_fixed_shapes)
    tree, plain = Profile(), Profile()
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        if number and time.perf_counter() - start > seconds:
            break
        for found in (tree, plain):
            if uses_fixed_shapes:  # steps are captured now, and replayed below
                _decode(observed, prompt, watch, Profile(), is_plain=found is plain)
            _decode(observed, prompt, watch, found, is_plain=found is plain)
    return tree, plain


def _decode(
    observed: Decoder, prompt: list[int], watch: "Stopwatch", found: Profile, *, is_plain: bool
) -> None:
    """Answer a prompt, and add what each part of it took."""
    responses = Responses(1, observed.limits)
    watch.restart()
    with watch.part("rest"):
        if is_plain:
            rule = GREEDY if observed.rule.name == "typical" else observed.rule
            steps = observed.plain_steps([prompt], responses, rule)
        else:
            steps = observed.steps([prompt], responses)
        next(steps, None)
        found.of_prompts.update(watch.taken())
        for _ in steps:
            pass
    found.of_steps.update(watch.taken())
    [response] = responses.rows
    found.prompts += 1
    found.steps += len(response.accept_lengths)
    found.tokens += len(response.tokens)


class Stopwatch(Observer):
    """Adds up the seconds of parts; while one runs inside another, the outer one's clock stands."""

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

    def taken(self) -> dict[str, float]:
        """Return the seconds of each part up to now, and begin anew."""
        self._lap()
        seconds = dict(self.seconds)
        self.restart()
        return seconds

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
        self._marks = []  # what a failed capture left
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _part_in_capture(self) -> str | None:
        """Return the part that is open; "rest", which is opened outside of captures, is none."""
        return self._open[-1] if self._open and self._open[-1] != "rest" else None
