"""The ways to answer a prompt that are measured side by side.

All of them are greedy, stop at the same tokens and count tokens from ids.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from medusa_exp.decode.answers import Decoded, Limits
from medusa_exp.decode.loop import decode_plain, decode_tree
from medusa_exp.decode.rule import Rule
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree


@dataclass(frozen=True)
class Answer:
    """What a method says to a prompt."""

    tokens: list[int]
    num_steps: int
    """Forward calls of the model, the prompt's included."""
    accept_lengths: list[int] | None
    """Tokens committed at each step, where that can be seen."""


Method = Callable[[list[int]], Answer]

LOOKUP_TOKENS = 10
"""Tokens that prompt lookup copies at a time: what the documentation of transformers suggests. It
runs so many positions beyond an answer's end."""


def build_methods(
    backbone: Backbone,
    heads: nn.Module,
    tree: Tree,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    baselines: list[str],
    rule: str = "greedy",
) -> dict[str, Method]:
    """Return name -> method: plain and tree, and the baselines asked for."""
    limits = Limits(max_new_tokens, stop_ids)
    options: Any = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    chosen = Rule(rule)
    methods: dict[str, Method] = {
        "plain": lambda ids: _answer(decode_plain(backbone, [ids], limits)),
        "tree": lambda ids: _answer(decode_tree(backbone, heads, tree, [ids], limits, chosen)),
        "hf_generate": lambda ids: hf_generate(backbone, ids, **options),
        "prompt_lookup": lambda ids: hf_generate(
            backbone, ids, **options, prompt_lookup_num_tokens=LOOKUP_TOKENS
        ),
    }
    return {name: methods[name] for name in ("plain", "tree", *baselines)}


@torch.inference_mode()
def hf_generate(
    backbone: Backbone,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    **options: Any,
) -> Answer:
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
    return Answer(tokens, steps, None)


def timed(method: Method, prompt_ids: list[int], device: torch.device) -> tuple[Answer, float]:
    """Return the answer and its wall time in seconds, the prompt's step included."""
    _synchronise(device)
    start = time.perf_counter()
    answer = method(prompt_ids)
    _synchronise(device)
    return answer, time.perf_counter() - start


def _answer(row: list[Decoded]) -> Answer:
    [decoded] = row
    return Answer(decoded.tokens, len(decoded.accept_lengths), decoded.accept_lengths)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
