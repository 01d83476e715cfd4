"""What an engine does for its users, measured from outside: speed, and which drafts it accepts.

An engine answers the same prompts with 1, 8, 32 of them on their way at a time. vLLM's counters
tell how many steps it has drafted for, and how often it accepted each position of a draft;
`predicted_drafts` is what it should count, by the chain of these heads here. K positions.
"""

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import median

import httpx2
from anyio.from_thread import start_blocking_portal

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.rule import GREEDY
from medusa_exp.errors import UserError
from medusa_exp.serving.client import Engine, Engines
from medusa_exp.tree import chain

log = logging.getLogger(__name__)

_COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})? (\S+)", re.M)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_SETTLED = 0.2
"""Seconds between two readings of the counters, which an engine updates after it has answered."""
_MOST_READINGS = 25
"""After so many, somebody else uses the engine."""


@dataclass(frozen=True)
class Drafts:
    """Steps that had a draft, draft tokens in all, and how many of each position were accepted."""

    steps: int
    tokens: int
    accepted_K: list[int]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that such a step gives: what is accepted, and one of the backbone's own."""
        return 1 + sum(self.accepted_K) / self.steps

    @property
    def shares_K(self) -> list[float]:
        """The share of steps that accept each position."""
        return [accepted / self.steps for accepted in self.accepted_K]


@dataclass(frozen=True)
class Level:
    """An engine's answers with so many prompts on their way at a time."""

    concurrency: int
    answers: list[list[int]]
    seconds: list[float]
    """Of each prompt, from its request to its answer."""
    wall_seconds: float
    """Of all together."""
    drafts: Drafts | None
    """None where the engine has no such counters, or they are not of these answers alone."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all prompts over the wall time."""
        return sum(map(len, self.answers)) / self.wall_seconds

    @property
    def ms_per_token(self) -> float:
        """What a user waits for a token: the median over prompts, in milliseconds."""
        pairs = zip(self.seconds, self.answers, strict=True)
        return 1000 * median(seconds / len(tokens) for seconds, tokens in pairs)

    def identical_fraction(self, expected: Sequence[list[int]]) -> float:
        """Return the share of answers that are these, token for token."""
        pairs = zip(self.answers, expected, strict=True)
        return sum(found == tokens for found, tokens in pairs) / len(expected)


def measure(
    engines: Engines, prompts: list[list[int]], levels: Sequence[int], *, warmup: int, seed: int
) -> list[Level]:
    """Let an engine answer the prompts at each concurrency in turn, and close it.

    Nobody else should use the engine meanwhile: its time is shared, and its counters count all.

    Args:
        engines: of one URL.
        prompts: token ids.
        levels: how many prompts are on their way at a time.
        warmup: prompts that are answered before the clock counts.
        seed: of sampling; each prompt has its own.

    Raises:
        UserError: the engine is not the one that is needed, or does not answer.
    """

    async def run() -> list[Level]:
        async with aclosing(engines):
            for prompt in prompts[:warmup]:
                await engines.respond(prompt)
            return [await _measure(engines, prompts, level, seed) for level in levels]

    with start_blocking_portal() as portal:
        return portal.call(run)


async def _measure(
    engines: Engines, prompts: list[list[int]], concurrency: int, seed: int
) -> Level:
    free = asyncio.Semaphore(concurrency)
    [engine] = engines.engines

    async def respond(row: int) -> tuple[list[int], float]:
        async with free:
            start = time.perf_counter()
            tokens = await engines.respond(prompts[row], seed + row)
            return tokens, time.perf_counter() - start

    before = await _counted(engine)
    start = time.perf_counter()
    found = await asyncio.gather(*(respond(row) for row in range(len(prompts))))
    wall_seconds = time.perf_counter() - start
    answers, seconds = zip(*found, strict=True)
    drafts = of_answers(_between(before, await _counted(engine)), list(answers))
    return Level(concurrency, list(answers), list(seconds), wall_seconds, drafts)


async def _counted(engine: Engine) -> dict[str, float] | None:
    """Return the counters of drafts once they have settled; None where the engine tells nothing."""
    seen = await _read_counters(engine)
    for _ in range(_MOST_READINGS):
        await asyncio.sleep(_SETTLED)
        now = await _read_counters(engine)
        if now == seen:
            break
        seen = now
    return seen


async def _read_counters(engine: Engine) -> dict[str, float] | None:
    try:
        response = await engine.request("GET", f"{engine.url.removesuffix('/v1')}/metrics")
    except httpx2.RequestError:
        return None
    if response.status_code != 200:
        return None
    return read_counters(response.text, engine.model)


def read_counters(text: str, model: str) -> dict[str, float]:
    """Return vLLM's counters of drafts from its page of metrics, summed over its processes.

    A name is as in `drafts`, `draft_tokens`, and `accepted_tokens_per_pos` with `@0`, `@1` ... .
    """
    found: dict[str, float] = {}
    for name, labels, value in _COUNTER.findall(text):
        known = dict(_LABEL.findall(labels))
        if known.get("model_name", model) == model and not name.endswith("_created"):
            full = f"{name}@{known['position']}" if "position" in known else name
            found[full] = found.get(full, 0.0) + float(value)
    return found


def _between(before: dict[str, float] | None, after: dict[str, float] | None) -> Drafts | None:
    if before is None or after is None:
        return None
    grown = {name: round(value - before.get(name, 0.0)) for name, value in after.items()}
    if min(grown.values(), default=0) < 0 or before.keys() - after.keys():
        log.warning("the counters of an engine began anew meanwhile: it has been restarted")
        return None
    if not grown.get("drafts"):
        return None
    prefix = "accepted_tokens_per_pos@"
    places = sorted(int(name.removeprefix(prefix)) for name in grown if name.startswith(prefix))
    accepted_K = [grown[f"{prefix}{place}"] for place in places]
    return Drafts(grown["drafts"], grown.get("draft_tokens", 0), accepted_K)


def of_answers(drafts: Drafts | None, answers: Sequence[list[int]]) -> Drafts | None:
    """Return the drafts, or None where these answers cannot have had so many.

    A step gives what it accepts, and one token more. What is over at the end of an answer was
    counted as well: at most a whole draft.
    """
    if drafts is None:
        return None
    most = sum(len(tokens) + len(drafts.accepted_K) for tokens in answers)
    if drafts.steps + sum(drafts.accepted_K) <= most:
        return drafts
    log.warning(
        "the engine has counted drafts of %d tokens, and answered with %d: others use it too. What "
        "it accepts stays unknown, and its speed is shared",
        drafts.steps + sum(drafts.accepted_K),
        sum(map(len, answers)),
    )
    return None


def predicted_drafts(
    decoder: Decoder, prompts: list[list[int]], lengths: list[int], num_positions: int
) -> Drafts:
    """Return what an engine should count that verifies the chain of these heads, greedily.

    An engine counts what a step accepts before the response is cut to its length, or at its end: so
    the chain is decoded beyond them here, and steps count that begin before them.

    Args:
        decoder: with the heads.
        prompts: token ids.
        lengths: tokens of each response.
        num_positions: draft tokens of a step: as many heads are used.
    """
    steps, accepted_K = 0, [0] * num_positions
    for prompt, length in zip(prompts, lengths, strict=True):
        limits = replace(
            decoder.limits,
            max_new_tokens=length + num_positions,
            stop_ids=(),
            stop_strings=(),
        )
        tree = chain(num_positions)
        [response] = decoder.decode([prompt], limits, tree=tree, rule=GREEDY)
        begun = response.accept_lengths[0]  # the prompt's step, which has no draft
        for accepted in response.accept_lengths[1:]:
            if begun >= length:
                break
            steps, begun = steps + 1, begun + accepted
            for position in range(accepted - 1):
                accepted_K[position] += 1
    return Drafts(steps, steps * num_positions, accepted_K)


def positions_of(drafts: Drafts, num_heads: int) -> int | None:
    """Return how many draft tokens each step had; None where that changed from step to step.

    Raises:
        UserError: more than there are heads.
    """
    number, rest = divmod(drafts.tokens, drafts.steps)
    if number > num_heads:
        raise UserError(
            f"evaluate.server drafts {number} tokens a step, and this run has {num_heads} heads: "
            "it serves other heads, or num_speculative_tokens is too large."
        )
    return None if rest else number
