"""The decode loop: prefill, then steps until every row of the batch has ended.

Plain decoding and speculative decoding over draft trees are twins, side by side: `plain_steps` and
`tree_steps` are generators that yield the tokens of each step, so that they can be shown as they
come. What happens inside a step of tree decoding is in `decode/step.py`; `decode.decoder.Decoder`
puts the two together. With CUDA graphs it decodes plainly by `tree_steps` too, over a tree that is
only a root, so that the baseline is captured in the same way; so it does with models that have
recurrent layers (`decode/recurrent.py`), one row after the other. The rows of a batch have prompts
of any lengths and end at different times, and the work of a step shrinks with them.

B rows, T prompt tokens, E ends of prompts among some of them, D hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from medusa_exp.decode.cache import FixedCache, GrowingCache
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.drafting import root_only
from medusa_exp.decode.lookup import Text
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.recurrent import ChainStep, StateCache, is_recurrent
from medusa_exp.decode.rule import GREEDY, AcceptanceRule, Verifier
from medusa_exp.decode.step import UNOBSERVED, Observer, Step, positions
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone

PREFILL_TOKENS = 4096
"""Prompt tokens of a batch that are run at a time: bounds the memory of activations."""


@dataclass(frozen=True)
class Limits:
    """Where a response ends."""

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    """A token that ends the response, and still belongs to it."""
    stop_strings: Sequence[str] = ()
    """Text that ends the response: the token with which it is complete is the last."""
    decode_text: Callable[[list[int]], str] | None = None
    """Tokens to text, for `stop_strings`."""

    def __post_init__(self) -> None:
        if self.stop_strings and self.decode_text is None:
            raise ValueError("stop_strings need decode_text, the tokenizer's decode.")

    def until_end(self, before: list[int], tokens: list[int]) -> tuple[list[int], bool]:
        """Return those of new tokens that belong to the response, and whether it has ended.

        Args:
            before: the response so far.
            tokens: what a step adds.
        """
        room, has_no_stop = self.max_new_tokens - len(before), self._stop_set.isdisjoint(tokens)
        if has_no_stop and not self.stop_strings and len(tokens) < room:  # as nearly always
            return tokens, False
        for place, token in enumerate(tokens[:room], 1):
            if token in self._stop_set or self._is_stop_text(before + tokens[:place]):
                return tokens[:place], True
        return tokens[:room], len(tokens) >= room

    @cached_property
    def _stop_set(self) -> frozenset[int]:
        return frozenset(map(int, self.stop_ids))

    def _is_stop_text(self, tokens: list[int]) -> bool:
        if not self.stop_strings:
            return False
        assert self.decode_text is not None
        # A stop string may begin anywhere before: but not more tokens back than it has bytes.
        longest = max(len(text.encode()) for text in self.stop_strings)
        tail = self.decode_text(tokens[-longest - 1 :])
        return any(text in tail for text in self.stop_strings)


@dataclass
class Response:
    """The tokens generated for a prompt, a stop token included, and how they came about.

    One entry a backbone step in the two lists; the first step is the prompt's.
    """

    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Of each step of the whole batch; in slots, this response's share of them. What a caller does
    with tokens counts, in slots only if it takes longer than a device takes for a step."""


class Responses:
    """The responses to a batch of prompts; rows end at different times."""

    def __init__(self, num_rows: int, limits: Limits) -> None:
        self.rows = [Response() for _ in range(num_rows)]
        self.limits = limits
        self.active = list(range(num_rows)) if limits.max_new_tokens > 0 else []
        """Rows that go on, in order."""
        self.kept: list[int] = list(range(num_rows))
        """Which of those that were active before the last step still are, by their place there."""
        self._clock = time.perf_counter()

    def commit(self, tokens_of_active: list[list[int]]) -> list[list[int]]:
        """Add a step's tokens, up to the end of each response; return those of every row.

        Args:
            tokens_of_active: tokens of each active row, in their order.
        """
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        added: list[list[int]] = [[] for _ in self.rows]
        self.kept = []
        for place, (row, tokens) in enumerate(zip(self.active, tokens_of_active, strict=True)):
            response = self.rows[row]
            kept, is_done = self.limits.until_end(response.tokens, tokens)
            response.tokens += kept
            response.accept_lengths.append(len(kept))
            response.step_seconds.append(seconds)
            added[row] = kept
            if not is_done:
                self.kept.append(place)
        self.active = [self.active[place] for place in self.kept]
        return added


@torch.inference_mode()
def plain_steps(
    backbone: Backbone,
    prompts: list[list[int]],
    responses: Responses,
    rule: AcceptanceRule = GREEDY,
    observer: Observer = UNOBSERVED,
) -> Iterator[list[list[int]]]:
    """Yield the tokens that each step adds to each row, without heads.

    Raises:
        UserError: a prompt is empty, or leaves no room for a response.
    """
    length, last = find_room(backbone, prompts, responses.limits)
    if is_recurrent(backbone):
        step = ChainStep(backbone, root_only(backbone.device), rule, observer)
        yield from tree_steps(step, prompts, responses, last)
        return
    cache = GrowingCache(backbone.num_layers, length + 1, len(prompts))
    mask = StepMask(backbone.model, length + 1)
    verifier = Verifier(rule, backbone.device)
    one_111 = torch.ones(1, 1, 1, dtype=torch.bool, device=backbone.device)
    depth_11 = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    part = observer.part
    logits_B1V, _ = prefill(backbone, prompts, cache, observer)
    while responses.active:
        with part("verification"):
            token_B = verifier.next_token(logits_B1V)
        yield responses.commit([[token] for token in token_B.tolist()])
        if len(responses.kept) < len(token_B) and responses.kept:
            cache.keep_rows(responses.kept)
            token_B = token_B[torch.tensor(responses.kept, device=token_B.device)]
        if responses.active:
            with part("mask"):
                of_step = mask.at(cache.lengths, one_111, depth_11)
            position_B1 = positions(cache.lengths, depth_11, last)
            with part("backbone"):
                logits_B1V, _ = backbone.forward(
                    token_B[:, None], cache, mask=of_step, position_ids_BN=position_B1
                )
            with part("cache"):
                cache.commit([[0]] * len(token_B))


@torch.inference_mode()
def tree_steps(
    step: Step, prompts: list[list[int]], responses: Responses, last: int
) -> Iterator[list[list[int]]]:
    """Yield the tokens that each step adds to each row: as `plain_steps`, in fewer steps.

    With the rules greedy and sampling what comes out is the same, or has the same distribution. On
    a device the next step is at work when tokens are yielded; who closes the generator gives it up.

    Args:
        step: with an empty cache, large enough for prompts and responses.
        prompts: token ids.
        responses: where tokens go.
        last: the last position that the model has for them; see `find_room`.
    """
    logits_B1V, hidden_BD = prefill(step.backbone, prompts, step.cache, step.observer)
    if not responses.active:
        return
    with step.observer.part("verification"):
        root_B = step.verifier.next_token(logits_B1V)
    found = step.found
    texts = [Text(prompt) for prompt in prompts] if found.width else []
    added = responses.commit([[token] for token in root_B.tolist()])
    yield added
    step.begin(root_B, hidden_BD, last)
    step.keep_rows(responses.kept)
    is_started = False
    while responses.active:
        if texts:
            for row in responses.active:
                texts[row].extend(added[row])
            wanted = [texts[row].continuation(found.width) for row in responses.active]
            found.write(step.active, wanted)
        if not is_started:
            step.start()
        added = responses.commit(step.finish())
        step.keep_rows(responses.kept)
        is_started = bool(responses.active) and not texts
        if is_started:  # what the caller does with the tokens, it does beside the next step
            step.start()
        yield added


def find_room(backbone: Backbone, prompts: list[list[int]], limits: Limits) -> tuple[int, int]:
    """Return the length that prompt and response may come to, and the last position there is.

    Raises:
        UserError: a prompt is empty, or leaves no room for a response.
    """
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise UserError("the prompt has no token: there is nothing to continue.")
    length = longest + limits.max_new_tokens
    limit = min(backbone.max_length_from(len(prompt)) for prompt in prompts)
    if length > limit:
        room = limit - longest
        remedy = "Shorten the prompt"
        if room > 0:
            remedy = f"Set max_new_tokens={room} or less (decode.max_new_tokens in a run's config)"
        raise UserError(
            f"a prompt of {longest} tokens and {limits.max_new_tokens} new ones make {length}; "
            f"the model has {limit} positions for it. {remedy}."
        )
    return length, limit - 1


def prefill(
    backbone: Backbone,
    prompts: list[list[int]],
    cache: GrowingCache | FixedCache | StateCache,
    observer: Observer = UNOBSERVED,
    layers: CompiledLayers | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the prompts, some columns at a time; return logits_B1V and hidden_BD of their ends.

    Shorter prompts are padded on the right, where no token of theirs looks.

    Args:
        backbone: that reads them.
        prompts: at least one token each.
        cache: empty, and large enough.
        observer: is told of this part.
        layers: of the backbone, compiled; None runs them as they are. They need an allocated cache,
            and prompts of no more than PREFILL_TOKENS together.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    ids_BT = ids_BT.to(backbone.device)
    columns = max(1, PREFILL_TOKENS // len(prompts))
    if isinstance(cache, StateCache):  # to go on from a state takes another way through a layer
        columns = longest
    at_end: dict[int, tuple[Tensor, Tensor]] = {}
    assert layers is None or longest <= columns, "compiled layers fill a cache in one call"
    compiled = nullcontext() if layers is None else layers.in_place(cache)
    for start in range(0, longest, columns):
        stop = min(start + columns, longest)
        # Logits are for the ends of prompts alone; where none ends, of one column.
        ends = sorted({n - 1 - start for n in lengths if start < n <= stop}) or [0]
        keep = torch.tensor(ends, device=backbone.device)
        with observer.part("prompt"), compiled:
            logits_BEV, hidden_BED = backbone.forward(ids_BT[:, start:stop], cache, keep=keep)
        for row, length in enumerate(lengths):
            if start < length <= stop:
                place = ends.index(length - 1 - start)
                at_end[row] = logits_BEV[row, place], hidden_BED[row, place]
    cache.set_lengths(lengths)
    logits, hidden = zip(*(at_end[row] for row in range(len(prompts))), strict=True)
    return torch.stack(logits)[:, None], torch.stack(hidden)


def extend(
    backbone: Backbone,
    added: list[list[int]],
    cache: GrowingCache,
    mask: StepMask,
    last: int,
    observer: Observer = UNOBSERVED,
) -> tuple[Tensor, Tensor]:
    """Run more tokens of each row, behind those that it has; return what `prefill` does.

    Args:
        backbone: whose cache it is.
        added: at least one token for each row.
        cache: rows may have any lengths; with room for the longest and all that is added.
        mask: of the backbone, for as many columns.
        last: the last position that the model has.
        observer: is told of this part.
    """
    longest = max(map(len, added))
    columns = max(1, PREFILL_TOKENS // len(added))
    at_end: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, longest, columns):
        pieces = [tokens[start : start + columns] for tokens in added]
        # As over a tree without branches, of which each row keeps its own tokens.
        width = max(map(len, pieces))
        ids_BT = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces])
        depth_1T = torch.arange(width, device=backbone.device)[None]
        sees_1TT = depth_1T[:, None, :] <= depth_1T[:, :, None]
        ends = sorted({len(piece) - 1 for piece in pieces if piece})
        with observer.part("prompt"):
            logits_BEV, hidden_BED = backbone.forward(
                ids_BT.to(backbone.device),
                cache,
                mask=mask.over(
                    torch.tensor(cache.lengths, device=backbone.device),
                    max(cache.lengths),
                    sees_1TT,
                    depth_1T,
                ),
                position_ids_BN=positions(cache.lengths, depth_1T, last),
                keep=torch.tensor(ends, device=backbone.device),
            )
        cache.commit([list(range(len(piece))) for piece in pieces])
        for row, piece in enumerate(pieces):
            if piece:  # of a row's pieces, the last counts
                place = ends.index(len(piece) - 1)
                at_end[row] = logits_BEV[row, place], hidden_BED[row, place]
    logits, hidden = zip(*(at_end[row] for row in range(len(added))), strict=True)
    return torch.stack(logits)[:, None], torch.stack(hidden)
