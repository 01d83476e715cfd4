"""The decoding methods that are measured side by side: plain, tree, chain and two of transformers.

At batch size 1 a method answers one prompt after another; at a larger one it is given all prompts
at once, and answers so many at a time, a prompt in the place of each that ends (`decode.slots`).

All of them stop at the same tokens, and tokens are counted from ids.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.loop import Response
from medusa_exp.decode.recurrent import is_recurrent
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.machine import synchronize
from medusa_exp.tree import chain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MethodResponse:
    """The response of a method to a prompt."""

    tokens: list[int]
    num_steps: int
    """Forward calls of the model, the prompt's included."""
    accept_lengths: list[int] | None
    """Tokens committed at each step, where that can be seen."""
    prompt_seconds: float | None = field(default=None, compare=False)
    """Until the first token, where that can be seen; of many prompts, as `seconds`."""
    seconds: float | None = None
    """Of many prompts answered side by side: this one's share of each step, and of its prompt's.
    The shares of all add up to the time that they took."""


Method = Callable[[list[list[int]]], list[MethodResponse]]
"""From a batch of prompts to their responses."""

LOOKUP_TOKENS = 10
"""Tokens that prompt lookup copies at a time: what the documentation of transformers suggests. It
runs so many positions beyond the end of a response."""
_SINGLE = ("hf_generate", "prompt_lookup")


def build_methods(
    decoder: Decoder, *, baselines: list[str], batch_size: int = 1, longest: int = 0
) -> dict[str, Method]:
    """Return name -> method: plain and tree, and those of the baselines that fit.

    `longest` is the most tokens of a prompt, which batches of more than one make room for.

    Methods of transformers are run greedily, one prompt at a time, and know no stop strings of
    ours. Prompt lookup cannot take back what a recurrent state has read: transformers refuses it.
    """
    backbone, limits, rule = decoder.backbone, decoder.limits, decoder.rule
    options: Any = {"max_new_tokens": limits.max_new_tokens, "stop_ids": limits.stop_ids}
    plain_rule = GREEDY if rule.name == "typical" else rule
    tree, all_heads = decoder.tree, chain(decoder.heads.num_heads)  # type: ignore[union-attr]
    if batch_size > 1:
        drafters = {"plain": decoder.root_only(), "tree": decoder.drafter(tree)}
        if "chain" in baselines:
            drafters["chain"] = decoder.drafter(all_heads)
        columns = longest + limits.max_new_tokens
        _make_room(decoder, drafters.values(), batch_size, columns)
        return {
            name: partial(
                answer_in_slots,
                decoder,
                drafter,
                plain_rule if name == "plain" else rule,
                batch_size,
                columns,
            )
            for name, drafter in drafters.items()
        }
    methods: dict[str, Method] = {
        "plain": lambda prompts: _responses(decoder.decode_plain(prompts, rule=plain_rule)),
        "tree": lambda prompts: _responses(decoder.decode(prompts, tree=tree)),
        "chain": lambda prompts: _responses(decoder.decode(prompts, tree=all_heads)),
        "hf_generate": lambda prompts: [hf_generate(backbone, ids, **options) for ids in prompts],
        "prompt_lookup": lambda prompts: [
            hf_generate(backbone, ids, **options, prompt_lookup_num_tokens=LOOKUP_TOKENS)
            for ids in prompts
        ],
    }
    is_comparable = rule.name == "greedy" and not limits.stop_strings
    chosen = [name for name in baselines if is_comparable or name not in _SINGLE]
    if "prompt_lookup" in chosen and is_recurrent(backbone):
        log.info("prompt_lookup is left out: %s has recurrent layers", backbone.name)
        chosen.remove("prompt_lookup")
    return {name: methods[name] for name in ("plain", "tree", *chosen)}


def _make_room(
    decoder: Decoder, drafters: Collection[Drafter], batch_size: int, columns: int
) -> None:
    """Make room for so many prompts at a time, whichever of the drafters answers them.

    Raises:
        UserError: memory is too small.
    """
    for drafter in drafters:
        number = decoder.slots_with_room(batch_size, columns, drafter, decoder.rule)
        if number < batch_size:
            raise UserError(
                f"evaluate.batch_sizes: {batch_size} prompts at a time do not fit into the free "
                f"memory, which has room for {number}: name a smaller size."
            )
    # For the largest tree first: to make more later would lose what is captured.
    largest = max(drafters, key=lambda drafter: drafter.num_nodes)
    decoder.slots(batch_size, columns, largest, decoder.rule)


def answer_in_slots(
    decoder: Decoder,
    drafter: Drafter,
    rule: AcceptanceRule,
    num_slots: int,
    num_columns: int,
    prompts: list[list[int]],
) -> list[MethodResponse]:
    """Answer prompts, so many at a time.

    Raises:
        UserError: memory is too small for so many at a time.
    """
    slots = decoder.slots(num_slots, num_columns, drafter, rule)
    slots.prepare()
    requests = (
        # Of one room, so that captured steps are of few sizes.
        Request(ids, decoder.limits, num_columns, _seed(rule, number), number)
        for number, ids in enumerate(prompts)
    )
    found = {finished.request.tag: finished.response for finished in slots.decode(requests)}
    rows = [found[number] for number in range(len(prompts))]
    return [
        replace(response, seconds=sum(row.step_seconds))
        for response, row in zip(_responses(rows), rows, strict=True)
    ]


def _seed(rule: AcceptanceRule, number: int) -> tuple[int, int] | None:
    return None if rule.seed is None else (rule.seed, number)


@torch.inference_mode()
def hf_generate(
    backbone: Backbone,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    **options: Any,
) -> MethodResponse:
    """Answer with `model.generate`; a step is one forward call of the model."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=next(iter(sorted(stop_ids)), 0),
        **options,
    )
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    ids_1T = torch.tensor([prompt_ids], device=backbone.device)
    model = backbone.model
    # What `settings` leaves open, generate takes from the model's own config, which may ask for
    # penalties: for this call there is none.
    own_settings, model.generation_config = model.generation_config, GenerationConfig()
    handle = model.register_forward_pre_hook(count)
    try:
        output_1T = model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings
        )
    finally:
        handle.remove()
        model.generation_config = own_settings
    tokens = output_1T[0, len(prompt_ids) :].tolist()
    return MethodResponse(tokens, steps, None)


def timed(
    method: Method, prompts: list[list[int]], device: torch.device
) -> tuple[list[MethodResponse], float]:
    """Return the responses and their wall time together in seconds, the prompts' step included."""
    synchronize(device)
    start = time.perf_counter()
    responses = method(prompts)
    synchronize(device)
    return responses, time.perf_counter() - start


def _responses(rows: list[Response]) -> list[MethodResponse]:
    return [
        MethodResponse(
            row.tokens, len(row.accept_lengths), row.accept_lengths, sum(row.step_seconds[:1])
        )
        for row in rows
    ]
