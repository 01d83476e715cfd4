"""Why the speed-up is no larger: from what acceptance alone would give, to what was measured.

If a step over the tree cost what a plain step costs, the speed-up would be the tokens per step: the
ideal I. It is M, because

    M = I * (tokens per step in decoding / those in validation) / c / (loss by batching)

where c is what a step over the tree costs on average, in plain tokens' time: 1 and what each part
takes more. Factors are told apart by their logarithms, which add up to ln(I / M) in any order, and
c's is divided among its parts as their seconds are. Times the logarithmic mean of I and M this
gives every part in units of the speed-up, and together they are I - M exactly: the additive form of
LMDI I (B. W. Ang, "The LMDI approach to decomposition analysis: a practical guide", Energy Policy
33, 2005). Taking away one cause after the other instead would make the first ones look larger.

What the host does between the parts is measured like the parts. Whatever seconds of a step no part
accounts for are `unexplained`, by name: noise, and what steps take when nobody watches them.

Costs are those of one prompt at a time; what more prompts at a time lose is the part `batch`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from medusa_exp.evaluate.metrics import Record, total
from medusa_exp.evaluate.step_profile import Profile
from medusa_exp.runs.metric_table import PARTS_OF_LOSS

_OF_TIME = {
    "heads": ("heads",),
    "width": ("backbone", "mask"),
    "verification": ("verification", "cache"),
    "host": ("rest",),
}
"""Part of the loss -> those of PARTS_OF_TIME that a step over the tree has more of."""


@dataclass(frozen=True)
class Way:
    """What it took to answer some prompts, one at a time, over a tree or plainly."""

    tokens: float
    steps: float
    """Those of the prompts included."""
    prompts: float
    seconds: float
    prompt_seconds: float
    """Of these, until the first token of each response."""
    of_a_step: Mapping[str, float]
    """Seconds of each of PARTS_OF_TIME in a later step, by `step_profile`."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a step after the prompt's; 0 where there is none."""
        later = self.steps - self.prompts
        return (self.seconds - self.prompt_seconds) / later if later else 0.0


@dataclass(frozen=True)
class Part:
    """One cause: what it takes of the speed-up; below 0 it adds to it."""

    name: str
    """One of PARTS_OF_LOSS."""
    times: float
    share: float
    """Of the ideal."""


@dataclass(frozen=True)
class Waterfall:
    """From the ideal to what was measured, so many prompts at a time."""

    batch_size: int
    ideal: float
    measured: float
    parts: list[Part]
    """In the order of PARTS_OF_LOSS; with `measured` they add up to `ideal`."""

    @property
    def largest(self) -> Part:
        """The part that takes most."""
        return max(self.parts, key=lambda part: part.times)


def way_of_records(records: list[Record], profile: Profile) -> Way | None:
    """Return what a method took, by its records of one prompt at a time; None if they cannot tell.

    Args:
        records: of the tree or of plain decoding.
        profile: of the same way of decoding, for the parts of a step.
    """
    if not records or any(record.get("prompt_seconds") is None for record in records):
        return None
    names = ("new_tokens", "steps", "seconds", "prompt_seconds")
    tokens, steps, seconds, of_prompts = (total(records, name) for name in names)
    return Way(tokens, steps, len(records), seconds, of_prompts, profile.of_a_step())


def way_of_profile(profile: Profile) -> Way:
    """Return what the profile itself took: for who has not measured one prompt at a time."""
    of_prompts = profile.of_prompts.total()
    return Way(
        profile.tokens,
        profile.steps,
        profile.prompts,
        of_prompts + profile.of_steps.total(),
        of_prompts,
        profile.of_a_step(),
    )


def extra_seconds(tree: Way, plain: Way) -> dict[str, float]:
    """Return part -> seconds that the tree's steps took more than as many average plain tokens.

    They add up to all that they took more. `prompt` is what prompts take above an average token,
    less what is in the average for plain decoding: they are run once in both ways, and over the
    tree there are fewer steps to share it.
    """
    later = tree.steps - tree.prompts
    as_plain = tree.steps * plain.seconds / plain.tokens
    found = {"prompt": tree.prompt_seconds + later * plain.step_seconds - as_plain}
    for name, parts in _OF_TIME.items():
        more = sum(tree.of_a_step.get(p, 0.0) - plain.of_a_step.get(p, 0.0) for p in parts)
        found[name] = later * more
    found["unexplained"] = tree.seconds - as_plain - sum(found.values())
    return found


def waterfalls(
    tree: Way,
    plain: Way,
    *,
    tokens_per_step: float,
    speedups: Mapping[int, float],
    expected: float | None = None,
) -> list[Waterfall]:
    """Return the way down for each batch size.

    Args:
        tree, plain: of one prompt at a time.
        tokens_per_step: in decoding, at the smallest batch size.
        speedups: batch size -> speed-up that was measured; 1 need not be among them.
        expected: tokens per step over this tree by validation; None where it says nothing of it.
    """
    if tree.steps <= tree.prompts or plain.steps <= plain.prompts:
        return []  # no step was taken after the prompts': nothing is sped up
    as_plain = tree.steps * plain.seconds / plain.tokens
    cost = tree.seconds / as_plain
    # ln(c) / (c - 1), by which seconds become shares of the logarithm.
    slope = math.log(cost) / (cost - 1) if abs(cost - 1) > 1e-9 else 1.0
    logs = {name: slope * s / as_plain for name, s in extra_seconds(tree, plain).items()}
    ideal = tokens_per_step
    if expected is not None:
        ideal, logs["acceptance"] = expected, math.log(expected / tokens_per_step)
    alone = tokens_per_step / cost
    return [
        _waterfall(size, ideal, speedup, {**logs, "batch": math.log(alone / speedup)})
        for size, speedup in sorted(speedups.items())
    ]


def _waterfall(size: int, ideal: float, measured: float, logs: Mapping[str, float]) -> Waterfall:
    gap = math.log(ideal / measured)
    mean = (ideal - measured) / gap if abs(gap) > 1e-9 else ideal
    parts = [
        Part(name, mean * logs[name], mean * logs[name] / ideal)
        for name in PARTS_OF_LOSS
        if name in logs and (name != "batch" or abs(logs[name]) > 1e-9)
    ]
    return Waterfall(size, ideal, measured, parts)


def metrics_of(found: Iterable[Waterfall]) -> dict[str, float]:
    """Return the `why/...` metrics: without a size, those of the smallest batch."""
    metrics: dict[str, float] = {}
    for number, one in enumerate(found):
        figures = {part.name: part.share for part in one.parts}
        figures["kept"] = one.measured / one.ideal
        if not number:
            metrics["why/ideal"] = one.ideal
            metrics |= {f"why/{name}": value for name, value in figures.items()}
        metrics |= {f"why/b{one.batch_size}/{name}": value for name, value in figures.items()}
    return metrics
