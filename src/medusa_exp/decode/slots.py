"""Continuous batching: many prompts decoded in a fixed number of slots.

A slot is a row of the KV cache. When the response in it ends, the next prompt takes its place, so
that a large batch stays full until prompts run out; from then on the batch shrinks. `Slots` is the
scheduler: it says which request is in which row and when prompts are run. Steps are those of
`decode/step.py`, of the sizes that `decode/slot_steps.py` makes.

What a request is answered with depends on nothing beside it in the batch (but for rounding): it
brings the seed of its own draws.

B rows, R rows among them, N nodes of a draft tree, D hidden, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.cache import GrowingCache, copy_of
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.lookup import Text
from medusa_exp.decode.loop import (
    PREFILL_TOKENS,
    Limits,
    Response,
    Responses,
    extend,
    find_room,
    prefill,
    tree_steps,
)
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.memory import columns_beside
from medusa_exp.decode.recurrent import ChainStep
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slot_steps import StepSource
from medusa_exp.decode.step import Observer, Step
from medusa_exp.model.backbone import Backbone

_GATHERED = 16
"""One of so many slots may stand idle until several prompts can be run together."""


@dataclass
class Request:
    """A prompt to be answered."""

    prompt: list[int]
    limits: Limits
    room: int = 0
    """Most tokens that prompt and response may come to, with what follows them in the slot."""
    seed: Sequence[int] | None = None
    """Of this response's draws, where it is sampled; None draws anew each time."""
    tag: Any = None
    """The caller's own."""

    def __post_init__(self) -> None:
        self.room = max(self.room, len(self.prompt) + self.limits.max_new_tokens)


@dataclass
class Finished:
    """A request with its response."""

    request: Request
    response: Response
    next: Request | None = None
    """To be set by who takes this: goes on in the same slot. What its prompt has in common with
    what is there is not run again."""


@dataclass(eq=False)  # or to find one among others would compare their prompts
class _Slot:
    request: Request
    row: int = -1
    response: Response = field(default_factory=Response)
    prefix: int = 0
    """Tokens of the prompt that are in the row already."""
    is_running: bool = False
    draws: np.random.Generator | None = None
    looked_up: int = 0
    """Tokens of the response that are in `text`."""
    text: Text | None = None
    """Where what may follow is looked up, if it is."""


class Slots:
    """Answers a stream of requests, a number of them at a time."""

    def __init__(self, source: StepSource, num_slots: int) -> None:
        self.source, self.backbone, self.num_slots = source, source.backbone, num_slots
        self.slot_steps = self.busy_slot_steps = 0
        """Rows of all steps, and those of them in which a response was being decoded."""
        self._live: list[_Slot] = []
        self._queue: deque[Request] = deque()
        self._is_draining = False
        """Can nothing more join those in the slots?"""
        self._size = 0, 0
        self._step: Step
        self._clock = self._seconds = 0.0
        """When tokens last came, and how long they took."""
        self._mask: StepMask | None = None

    def prepare(self) -> None:
        """Make what steps need, so that none of it is made while requests are timed."""
        self.source.prepare()

    @property
    def idle_share(self) -> float:
        """Share of the rows of all steps in which nothing was decoded."""
        return 1 - self.busy_slot_steps / max(1, self.slot_steps)

    @torch.inference_mode()
    def decode(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Yield responses as they end.

        Captured steps are of the size that the longest request at hand needs: with the longest
        first, there are few sizes.

        Raises:
            UserError: a prompt is empty or leaves no room for a response, or the tree asks for
                draft tokens that the heads do not have.
        """
        requests = iter(requests)
        self._clock = perf_counter()
        while True:
            is_time = self._admit(requests)
            if not self._live:
                return
            self._arrange()
            for group in self._groups() if is_time else ():
                yield from self._commit(group, self._until_end(group, self._prefill(group)))
            yield from self._take_steps()

    def _take_steps(self) -> Iterator[Finished]:
        """Take steps until it is time to run prompts or to shrink the batch.

        The host's work after a step is done while a device runs the next one: with many slots, a
        response ends in nearly every step.
        """
        running = self._running()
        if running:
            self._start(running)
        while running:
            before, added = running, self._until_end(running, self._step.finish())
            running = [s for s, (_, has_ended) in zip(before, added, strict=True) if not has_ended]
            running = running if self._may_start(running) else []
            if running:
                self._start(running)
            yield from self._commit(before, added)

    def _may_start(self, running: list[_Slot]) -> bool:
        """May a step of these begin before the tokens of the last one have been committed?"""
        if not running or self._step.found.width:  # what may follow is looked up behind them
            return False
        # In a batch that drains, a next turn is run at once: so nobody may have ended.
        is_same = self._is_draining and len(running) == len(self._live)
        return self._is_full(len(running)) or (is_same and self._size == self._size_for(running))

    def _is_full(self, num_running: int) -> bool:
        """Are too few slots free for prompts to be run now? They wait for others: `_GATHERED`."""
        num_rows = self._size[0]
        return num_running > 0 and (num_rows - num_running) * _GATHERED < num_rows

    def _running(self) -> list[_Slot]:
        return sorted((slot for slot in self._live if slot.is_running), key=lambda slot: slot.row)

    def _admit(self, requests: Iterator[Request]) -> bool:
        """Take requests for free slots, if it is time to run prompts; return whether it is."""
        if self._is_full(sum(slot.is_running for slot in self._live)):
            return False
        while len(self._live) < self.num_slots:
            if not self._queue:
                self._queue.extend(next(([request] for request in requests), []))
            # The batch shrinks too while what is next waits until it is empty: it never grows.
            self._is_draining = not self._queue or not self._may_join(self._queue[0])
            if self._is_draining:
                break
            self._live.append(self._slot_of(self._queue.popleft()))
        return True

    def _may_join(self, request: Request) -> bool:
        """Have all requests in the slots the same last position? See `Backbone.max_length_from`."""
        _, last = find_room(self.source.backbone, [request.prompt], request.limits)
        if not self._live:
            self._size, self._last = (0, 0), last  # from now on this one
        return last == self._last

    def _slot_of(self, request: Request, row: int = -1, prefix: int = 0) -> _Slot:
        assert request.room <= self.source.num_columns, "a request longer than was said"
        slot = _Slot(request, row, prefix=prefix)
        if self.source.rule.name == "sampling":
            slot.draws = np.random.default_rng(request.seed)
        return slot

    def _arrange(self) -> None:
        """Have a step of the size that is needed, and a row of it for each request."""
        size = self._size_for(self._live)
        num_rows, _ = size
        used = {slot.row for slot in self._live}
        free = (row for row in range(num_rows) if row not in used)
        if size != self._size:
            moved = [slot for slot in self._live if slot.row >= num_rows]
            rows, to = [slot.row for slot in moved], [next(free) for _ in moved]
            self._resize(size, rows, to)
            for slot, row in zip(moved, to, strict=True):
                slot.row = row
        for slot in self._live:
            slot.row = next(free) if slot.row < 0 else slot.row

    def _size_for(self, slots: list[_Slot]) -> tuple[int, int]:
        """Return the rows and columns of a step for these."""
        num_rows = self.source.num_rows(len(slots)) if self._is_draining else self.num_slots
        return num_rows, max(slot.request.room for slot in slots)

    def _resize(self, size: tuple[int, int], rows: list[int], to: list[int]) -> None:
        source, is_new = self.source, not self._size[0]
        step = source.fit(None if is_new else self._step, *size, rows, to)
        if is_new:
            device, dtype = source.backbone.device, source.backbone.model.dtype
            root_B = torch.zeros(size[0], dtype=torch.long, device=device)
            hidden_BD = torch.zeros(
                size[0], source.backbone.hidden_size, dtype=dtype, device=device
            )
            step.begin(root_B, hidden_BD, self._last)
        if source.rule.name == "sampling":
            shape, device = (size[0], source.drafter.num_uniforms), source.backbone.device
            self._uniforms_BN = torch.zeros(shape, pin_memory=device.type == "cuda")
            given = step.verifier.uniforms_BN
            if given is None or given.shape != shape:
                step.verifier.uniforms_BN = torch.zeros(shape, device=device)
        self._step, self._size = step, size

    def _groups(self) -> Iterator[list[_Slot]]:
        """Yield what waits by what can be run together: similar lengths, in bounded memory."""
        waiting = [slot for slot in self._live if not slot.is_running]
        waiting.sort(key=lambda slot: (slot.prefix > 0, slot.prefix - len(slot.request.prompt)))
        columns = columns_beside(self.num_slots, self.source.num_columns)
        group: list[_Slot] = []
        for slot in waiting:
            if group:
                added = len(group[0].request.prompt) - group[0].prefix
                width = added + max(one.prefix for one in (*group, slot))
                is_alike = (group[0].prefix > 0) == (slot.prefix > 0)
                most = min(PREFILL_TOKENS // added, columns // width)
                if not is_alike or len(group) + 1 > most:
                    yield group
                    group = []
            group.append(slot)
        if group:
            yield group

    def _prefill(self, group: list[_Slot]) -> list[list[int]]:
        """Run prompts and put them into their rows; return the token after each."""
        step, backbone = self._step, self.source.backbone
        prompts, rows = [slot.request.prompt for slot in group], [slot.row for slot in group]
        prefixes = [slot.prefix for slot in group]
        added = [prompt[slot.prefix :] for prompt, slot in zip(prompts, group, strict=True)]
        longest = max(map(len, added))
        if max(prefixes):
            if self._mask is None:
                keeps_full = self.source.drafter.prefix is not None
                columns = self.source.num_columns
                self._mask = StepMask(backbone.model, columns, keeps_full=keeps_full)
            cache = copy_of(step.cache, rows, prefixes, max(prefixes) + longest)
            logits_R1V, hidden_RD = extend(
                backbone, added, cache, self._mask, self._last, step.observer
            )
        else:
            cache = GrowingCache(backbone.num_layers, longest, len(group))
            layers = self._layers_for(len(group), longest)
            if layers is not None:
                cache.allocate(step.cache)
            logits_R1V, hidden_RD = prefill(backbone, prompts, cache, step.observer, layers)
        with step.observer.part("verification"):
            root_R = step.verifier.next_token(logits_R1V, self._first_draws(group))
        index = torch.tensor(rows, device=root_R.device)
        with step.observer.part("cache"):
            step.cache.put(rows, cache)
        step.root_B[index], step.hidden_BD[index] = root_R, hidden_RD
        for slot in group:
            slot.is_running = True
        return [[token] for token in root_R.tolist()]

    def _layers_for(self, number: int, longest: int) -> CompiledLayers | None:
        """Return the layers that run so many prompts compiled; None runs them as they are.

        In few slots prompts run one by one as slots become free: a graph for several does not pay.
        """
        are_gathered = self.num_slots > _GATHERED
        # A batch or a length of 1 would be compiled anew.
        return self.source.layers if are_gathered and min(number, longest) > 1 else None

    def _first_draws(self, group: list[_Slot]) -> Tensor | None:
        if self.source.rule.name != "sampling":
            return None
        draws = [slot.draws.random(1, np.float32) for slot in group if slot.draws]
        return torch.from_numpy(np.stack(draws)).to(self.source.backbone.device)

    def _start(self, running: list[_Slot]) -> None:
        """Begin a step of these."""
        step, rows = self._step, [slot.row for slot in running]
        if rows != step.active:
            step.activate(rows)
        if self.source.rule.name == "sampling":
            given, made_BN = step.verifier.uniforms_BN, self._uniforms_BN.numpy()
            assert given is not None
            for slot in running:
                assert slot.draws is not None
                slot.draws.random(dtype=np.float32, out=made_BN[slot.row])
            # They are written again when this step has ended, and with it the copy.
            given.copy_(self._uniforms_BN, non_blocking=True)
        if width := step.found.width:
            step.found.write(rows, [_look_up(slot, width) for slot in running])
        step.start()
        self.slot_steps += self._size[0]
        self.busy_slot_steps += len(running)

    def _until_end(
        self, slots: list[_Slot], tokens: list[list[int]]
    ) -> list[tuple[list[int], bool]]:
        """Return what of its tokens belongs to each slot's response, and whether that has ended.

        Called as soon as they come: how long they took is noted.
        """
        now = perf_counter()
        self._seconds, self._clock = now - self._clock, now
        return [
            slot.request.limits.until_end(slot.response.tokens, added)
            for slot, added in zip(slots, tokens, strict=True)
        ]

    def _commit(
        self, slots: list[_Slot], added: list[tuple[list[int], bool]]
    ) -> Iterator[Finished]:
        """Add tokens to the responses; yield those that end, and give their slots away."""
        ended = []
        for slot, (tokens, has_ended) in zip(slots, added, strict=True):
            slot.response.tokens += tokens
            slot.response.accept_lengths.append(len(tokens))
            slot.response.step_seconds.append(self._seconds / len(slots))
            if has_ended:
                slot.is_running = False
                ended.append(slot)
        for slot in ended:
            finished, asked = Finished(slot.request, slot.response), perf_counter()
            yield finished
            if not self._step.is_at_work:  # else the caller works beside the step
                self._clock += perf_counter() - asked
            self._replace(slot, finished.next)

    def _replace(self, slot: _Slot, request: Request | None) -> None:
        self._live.remove(slot)
        if request is not None:
            _, last = find_room(self.source.backbone, [request.prompt], request.limits)
            if last == self._last:
                prefix = self._in_common(slot, request.prompt)
                self._live.append(self._slot_of(request, slot.row, prefix))
                return
            self._queue.append(request)
        self.source.free(self._step, slot.row)

    def _in_common(self, slot: _Slot, prompt: list[int]) -> int:
        """Return how many tokens of a prompt are in a slot's row already."""
        known = slot.request.prompt + slot.response.tokens
        if prompt[: len(known)] != known:
            return 0
        return len(known) - 1  # the last token of a response has not been run


def _look_up(slot: _Slot, length: int) -> list[int]:
    """Return what may follow in a slot; called before each of its steps."""
    if slot.text is None:
        slot.text = Text(slot.request.prompt)
    slot.text.extend(slot.response.tokens[slot.looked_up :])
    slot.looked_up = len(slot.response.tokens)
    return slot.text.continuation(length)


class OneByOne:
    """Answers a stream of requests in one slot: for models with recurrent layers.

    Has of `Slots` what its callers use.
    """

    idle_share = 0.0

    def __init__(
        self, backbone: Backbone, drafter: Drafter, rule: AcceptanceRule, observer: Observer
    ) -> None:
        self.slot_steps = 0
        self.backbone, self.drafter, self.rule, self.observer = backbone, drafter, rule, observer

    def prepare(self) -> None:
        """There is nothing to make beforehand."""

    @torch.inference_mode()
    def decode(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Yield responses as they end; see `Slots`."""
        for request in requests:
            asked: Request | None = request
            while asked is not None:
                finished = Finished(asked, self._respond(asked))
                yield finished
                asked = finished.next

    def _respond(self, request: Request) -> Response:
        seed = int(np.random.SeedSequence(request.seed).generate_state(1)[0])
        step = ChainStep(self.backbone, self.drafter, self.rule, self.observer)
        step.verifier.restart(seed)
        _, last = find_room(self.backbone, [request.prompt], request.limits)
        responses = Responses(1, request.limits)
        for _ in tree_steps(step, [request.prompt], responses, last):
            self.slot_steps += 1
        return responses.rows[0]
