"""The ways to answer a prompt that are measured side by side.

All of them stop at the same tokens and count tokens from ids.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from medusa_exp.decode.loop import GREEDY, Limits, Response, decode_plain, decode_tree
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree, chain


@dataclass(frozen=True)
class MethodResponse:
    """What a method says to a prompt."""

    tokens: list[int]
    num_steps: int
    """Forward calls of the model, the prompt's included."""
    accept_lengths: list[int] | None
    """Tokens committed at each step, where that can be seen."""


Method = Callable[[list[list[int]]], list[MethodResponse]]
"""From a batch of prompts to their answers."""

LOOKUP_TOKENS = 10
"""Tokens that prompt lookup copies at a time: what the documentation of transformers suggests. It
runs so many positions beyond an answer's end."""
_SINGLE = ("hf_generate", "prompt_lookup")


def build_methods(
    backbone: Backbone,
    heads: nn.Module,
    tree: Tree,
    limits: Limits,
    rule: AcceptanceRule,
    *,
    baselines: list[str],
    batch_size: int = 1,
) -> dict[str, Method]:
    """Return name -> method: plain and tree, and those of the baselines that fit.

    Methods of transformers are run greedily, one prompt at a time, and know no stop strings of
    ours.
    """
    options: Any = {"max_new_tokens": limits.max_new_tokens, "stop_ids": limits.stop_ids}
    plain_rule = GREEDY if rule.name == "typical" else rule

    def over(a_tree: Tree) -> Method:
        return lambda prompts: _responses(
            decode_tree(backbone, heads, a_tree, prompts, limits, rule)
        )

    methods: dict[str, Method] = {
        "plain": lambda prompts: _responses(decode_plain(backbone, prompts, limits, plain_rule)),
        "tree": over(tree),
        "chain": over(chain(heads.num_heads)),
        "hf_generate": lambda prompts: [hf_generate(backbone, ids, **options) for ids in prompts],
        "prompt_lookup": lambda prompts: [
            hf_generate(backbone, ids, **options, prompt_lookup_num_tokens=LOOKUP_TOKENS)
            for ids in prompts
        ],
    }
    is_comparable = rule.name == "greedy" and not limits.stop_strings and batch_size == 1
    chosen = [name for name in baselines if is_comparable or name not in _SINGLE]
    return {name: methods[name] for name in ("plain", "tree", *chosen)}


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
    """Return the answers and their wall time together in seconds, the prompts' step included."""
    synchronize(device)
    start = time.perf_counter()
    answers = method(prompts)
    synchronize(device)
    return answers, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _responses(rows: list[Response]) -> list[MethodResponse]:
    return [MethodResponse(row.tokens, len(row.accept_lengths), row.accept_lengths) for row in rows]
