"""Responses from running engines (vLLM, SGLang): token ids go there, token ids come back.

What is asked is the completions API of OpenAI's servers, `POST /v1/completions`, with two fields
that both engines have: a prompt may be ids, and `return_token_ids` asks for ids. Nothing is
rendered or tokenized on the way, so a response is the one that the model gives here.

Engines differ in how they end a response, and may end one where ours would go on (at an end of
their own, or at a stop string within a token): `Engines.respond` has the ends of `Limits`, exactly.
An engine that fails for a moment is asked again, and what it had goes to the others; one that is of
another model, or that does not answer by ids, is refused.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import httpx2
import msgspec
from anyio.from_thread import start_blocking_portal

from medusa_exp.config.privacy import shareable_text
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.serving.completions import (
    HINTS,
    PASSING,
    Choice,
    Completion,
    Models,
    endpoint,
    sampling,
    seconds_of,
)

log = logging.getLogger(__name__)

_FIRST_REST, _LONGEST_REST = 0.25, 30.0
"""Seconds before an engine that has failed is asked again; they double with each failure."""
Item = TypeVar("Item")
Result = TypeVar("Result")
Found = TypeVar("Found")


class Unavailable(Exception):
    """An engine does not answer now.

    Args:
        fault: what happened.
        rest: seconds after which it wants to be asked again, where it says so.
        is_gone: may it be another one when it is back?
    """

    def __init__(self, fault: str, rest: float | None = None, *, is_gone: bool = False) -> None:
        super().__init__(fault)
        self.rest, self.is_gone = rest, is_gone


@dataclass(frozen=True)
class Probe:
    """A prompt, and what the model says after it greedily: by that its engine is known."""

    prompt: list[int]
    expected: list[int]


@dataclass(frozen=True)
class Work:
    """What is asked of every engine."""

    limits: Limits
    rule: AcceptanceRule
    vocab_size: int
    max_length: int
    """Tokens that prompt and response may come to."""
    model: str | None = None
    """Name under which the engine serves the model; None is for the only one."""
    probes: Sequence[Probe] = ()
    is_same: Callable[[Probe, list[int]], bool] = lambda probe, found: probe.expected == found
    """Is this response to a probe the expected one, as far as arithmetic goes?"""
    patience: float = 300.0
    """Seconds that an engine may take for an answer. A request is given up after twice as many,
    failed attempts included."""


@dataclass(frozen=True)
class Answer:
    """What an engine has returned: ids, and the token at which it ended if that is not in them."""

    tokens: list[int]
    withheld: int | None = None

    @property
    def whole(self) -> list[int]:
        """All tokens, with that one."""
        return self.tokens if self.withheld is None else [*self.tokens, self.withheld]


@dataclass
class Engine:
    """One engine, and what is known of it."""

    url: str
    """Up to and with /v1, without user and password."""
    auth: tuple[str, str] | None
    """Those, where the URL has them."""
    work: Work
    http: httpx2.AsyncClient
    key: str | None = None
    """What `http` sends for it: no message may have it."""
    model: str = ""
    """Its name for the model, once it has been asked."""
    fingerprint: str | None = None
    """What it says of its own version."""
    in_flight: int = 0
    failures: int = 0
    fault: str = ""
    rested_at: float = 0.0
    rests_until: float = 0.0
    is_checked: bool = False
    _withholds_end: bool = False
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, ids: list[int], room: int, seed: int) -> Answer:
        """Ask for at most `room` tokens after `ids`; of a new engine, first whether it is right.

        Raises:
            Unavailable: it does not answer now.
            UserError: it is not the engine that is needed.
        """
        self.in_flight += 1
        try:
            await self.check()
            return await self._complete(ids, room, self.work.rule, self.work.limits, seed)
        finally:
            self.in_flight -= 1

    async def check(self) -> None:
        """Make sure, once, that it has the model, that it speaks in ids, and how it ends.

        Raises:
            Unavailable, UserError: as `ask`.
        """
        async with self._checking:
            if self.is_checked:
                return
            if self.rests_until > time.monotonic():  # it failed while this one waited
                raise Unavailable(self.fault)
            self.model = await self._find_model()
            if self.work.probes:
                await self._check_end(self.work.probes[0].prompt)
            for probe in self.work.probes:
                limits = Limits(len(probe.expected), self.work.limits.stop_ids)
                answer = await self._complete(
                    probe.prompt, limits.max_new_tokens, GREEDY, limits, 0
                )
                found = answer.whole
                if found and probe.expected[: len(found)] == found:  # it may have ended by itself
                    continue
                if not self.work.is_same(probe, found):
                    raise UserError(
                        f"{self.url} answers otherwise than the model of this run: after the "
                        f"{len(probe.prompt)} tokens {_ids(probe.prompt)} it says {_ids(found)}, "
                        f"the model {_ids(probe.expected)}. Does it serve the same weights, in the "
                        "same dtype and not quantized?"
                    )
            self.is_checked = True

    async def _find_model(self) -> str:
        found = await self._call("GET", "models", Models)
        models = {model.id: model for model in found.data}
        wanted = self.work.model or (next(iter(models)) if len(models) == 1 else None)
        if wanted not in models:
            why = f"has no model {wanted or ''}".rstrip()
            if models and not wanted:
                why = "has several models: set serving.model to one"
            raise UserError(f"{self.url} {why}: it serves {', '.join(models) or 'none'}.")
        length = models[wanted].max_model_len
        if length is not None and length < self.work.max_length:
            raise UserError(
                f"{self.url} takes {length} tokens, and {self.work.max_length} are needed: start "
                f"it with a longer context (--max-model-len, --context-length), or lower "
                "dataset.max_length."
            )
        return models[wanted].id

    async def _check_end(self, prompt: list[int]) -> None:
        """Find out whether it returns the token that ends a response: make it end at once."""
        first = (await self._complete(prompt, 1, GREEDY, Limits(1), 0)).tokens
        at_once = await self._complete(prompt, 2, GREEDY, Limits(2, first), 0)
        if len(at_once.tokens) > 1:
            log.warning(
                "%s goes on after stop_token_ids: what it says more is cut off, and costs time",
                self.url,
            )
        self._withholds_end = not at_once.tokens

    async def _complete(
        self, ids: list[int], room: int, rule: AcceptanceRule, limits: Limits, seed: int
    ) -> Answer:
        # All is said that an engine would else take from the model's generation_config.json.
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": room,
            "stop_token_ids": sorted(limits.stop_ids),
            "stop": list(limits.stop_strings),
            "return_token_ids": True,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "min_p": 0.0,
            **sampling(rule, seed),
        }
        found = await self._call("POST", "completions", Completion, body)
        self.fingerprint = found.system_fingerprint or self.fingerprint
        return self._read(found, ids, limits)

    def _read(self, found: Completion, ids: list[int], limits: Limits) -> Answer:
        """Take an answer apart, and refuse one that is not what was asked for."""
        if len(found.choices) > 1:
            raise UserError(f"{self.url} gives {len(found.choices)} answers where one was asked.")
        choice = found.choices[0] if found.choices else Choice()
        tokens, finish = choice.token_ids, choice.finish_reason
        echoed = choice.prompt_token_ids or found.prompt_token_ids
        if tokens is None or echoed is None:
            raise UserError(
                f"{self.url} answers without token ids, so it does not know return_token_ids: "
                "take a newer vLLM or SGLang."
            )
        if echoed != ids:
            raise UserError(
                f"{self.url} has read another prompt than it was sent: {_ids(echoed)} instead of "
                f"{_ids(ids)}. Something on the way puts templates or marks around prompts."
            )
        foreign = [token for token in tokens if not 0 <= token < self.work.vocab_size]
        if foreign:
            raise UserError(
                f"{self.url} says token {foreign[0]}, and the model of this run has "
                f"{self.work.vocab_size}: it serves another."
            )
        if finish is None and not self.is_checked:
            raise UserError(
                f"{self.url} does not say finish_reason: it is neither vLLM nor SGLang."
            )
        if finish not in ("stop", "length"):
            raise Unavailable(f"it ended a response by {finish!r}")
        withheld = self._withheld(tokens, choice, limits) if finish == "stop" else None
        return Answer(tokens, withheld)

    def _withheld(self, tokens: list[int], choice: Choice, limits: Limits) -> int | None:
        """Return the token that has ended a response without being in it; None where there is none.

        vLLM names it in `stop_reason`, SGLang in `matched_stop`; a text there is a stop string.
        """
        named = choice.matched_stop if choice.stop_reason is None else choice.stop_reason
        if isinstance(named, str) or (tokens and tokens[-1] in limits.stop_ids):
            return None
        if isinstance(named, int):
            is_in = bool(tokens) and tokens[-1] == named
            return None if is_in else named
        if not self._withholds_end:
            return None
        if len(limits.stop_ids) != 1 or limits.stop_strings:
            raise UserError(
                f"{self.url} neither returns nor names the token that ends a response, and there "
                f"are several: {sorted(limits.stop_ids)}."
            )
        return next(iter(limits.stop_ids))

    async def request(self, method: str, url: str, **options: Any) -> httpx2.Response:
        """Send a request, with user and password where it has them."""
        auth = self.auth or httpx2.USE_CLIENT_DEFAULT
        return await self.http.request(method, url, auth=auth, **options)

    async def _call(self, method: str, path: str, kind: type[Found], body: Any = None) -> Found:
        try:
            async with asyncio.timeout(self.work.patience):  # of all: answers may come in drops
                response = await self.request(method, f"{self.url}/{path}", json=body)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise Unavailable(f"{type(error).__name__}: no answer in time") from error
        except httpx2.RequestError as error:
            fault = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise Unavailable(fault, is_gone=True) from error
        if response.status_code in PASSING:
            raise Unavailable(
                f"HTTP status {response.status_code}",
                seconds_of(response.headers.get("retry-after")),
                is_gone=response.status_code not in (408, 429),
            )
        if response.status_code != 200:
            raise UserError(
                f"{self.url} refuses {method} {path} with HTTP status {response.status_code}: "
                f"{self._quoted(response.text)}{HINTS.get(response.status_code, '')}"
            )
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(
                f"{self.url} answers {method} {path} otherwise than the API of OpenAI's servers "
                f"does: {error}. Is it the URL of such a server?"
            ) from error

    def _quoted(self, text: str) -> str:
        for secret in (self.key, self.auth and self.auth[1]):
            text = text.replace(secret, "...") if secret else text
        return shareable_text(" ".join(text.split())[:300])


class Engines:
    """Engines that serve one model, used side by side, and closed in the end (`aclosing`).

    Args:
        urls: of the engines, with or without /v1.
        work: what is asked of them.
        key: sent as a bearer token, if they ask for one.
    """

    def __init__(self, urls: Sequence[str], work: Work, key: str | None = None) -> None:
        self.work = work
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Nothing of the environment: a proxy or a password of ~/.netrc would be one nobody named.
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(work.patience, connect=10.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self.engines = [Engine(*endpoint(url), work, self._http, key) for url in urls]

    async def aclose(self) -> None:
        """Close the connections to them."""
        await self._http.aclose()

    async def respond(self, prompt: list[int], seed: int = 0) -> list[int]:
        """Return the response to a prompt, with the ends that `work.limits` says.

        Where an engine has ended and the limits do not, it is asked to go on from there.

        Raises:
            UserError: an engine is not the one that is needed, or none has answered for too long.
        """
        tokens: list[int] = []
        limits, is_done = self.work.limits, False
        while not is_done:
            room = limits.max_new_tokens - len(tokens)
            answer = await self._ask(prompt + tokens, room, seed + len(tokens))
            added, is_done = limits.until_end(tokens, answer.whole)
            if not added:
                raise UserError(
                    f"an engine ends a response to {_ids(prompt)} before its end, after "
                    f"{len(tokens)} tokens: it has an end of its own that it does not name."
                )
            tokens += added
        return tokens

    async def _ask(self, ids: list[int], room: int, seed: int) -> Answer:
        """Ask an engine that is awake, and again until one has answered."""
        start, fault = time.monotonic(), ""
        while True:
            engine = await self._awake(start + 2 * self.work.patience, fault)
            sent = time.monotonic()
            try:
                answer = await engine.ask(ids, room, seed)
            except Unavailable as error:
                fault = f"{engine.url}: {error}"
                _rest(engine, error, sent)
                continue
            if engine.failures:
                log.info("%s answers again", engine.url)
            engine.failures = 0
            return answer

    async def _awake(self, deadline: float, fault: str) -> Engine:
        """Wait for an engine that may be asked; of several, return the one with least to do."""
        while True:
            now = time.monotonic()
            if fault and now > deadline:
                raise UserError(
                    f"no answer for {2 * self.work.patience:.0f} seconds; the last that was heard: "
                    f"{fault}. Start the engine again; the same command goes on where it stopped."
                )
            awake = [engine for engine in self.engines if engine.rests_until <= now]
            if awake:
                return min(awake, key=lambda engine: engine.in_flight)
            await asyncio.sleep(min(engine.rests_until for engine in self.engines) - now)


def answers(
    engines: Engines,
    answer: Callable[[Item], Awaitable[Result]],
    items: Iterable[Item],
    concurrency: int,
) -> Iterator[Result]:
    """Yield `await answer(item)` for each item, as they come, with so many on their way at a time.

    What is on its way when the caller stops is given up.

    Args:
        engines: opened for it, and closed after it.
        answer: runs in an event loop of its own, in another thread.
        items: what to answer.
        concurrency: how many at a time.

    Raises:
        UserError: what `answer` raises, after what has been answered by then.
    """
    todo = iter(items)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(aclosing(engines)):
        flying: set[Future[Result]] = set()
        try:
            while True:
                for item in islice(todo, concurrency - len(flying)):
                    flying.add(portal.start_task_soon(answer, item))
                if not flying:
                    return
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda one: one.exception() is not None):
                    yield future.result()
        finally:
            for future in flying:
                future.cancel()


def _rest(engine: Engine, error: Unavailable, sent: float) -> None:
    """Leave an engine alone for a while, once for all requests that have failed together."""
    engine.is_checked &= not error.is_gone
    if sent < engine.rested_at:
        return
    if not engine.failures:
        log.warning("%s does not answer (%s): it is asked again", engine.url, error)
    doubled = min(_LONGEST_REST, _FIRST_REST * 2**engine.failures)
    seconds = doubled * random.uniform(0.5, 1) if error.rest is None else error.rest
    seconds = min(max(seconds, _FIRST_REST / 2), 2 * _LONGEST_REST)
    engine.failures, engine.fault = engine.failures + 1, str(error)
    engine.rested_at = time.monotonic()
    engine.rests_until = engine.rested_at + seconds


def _ids(ids: list[int]) -> str:
    few = ", ".join(map(str, ids[:12]))
    return f"[{few}{', ...' if len(ids) > 12 else ''}]"
