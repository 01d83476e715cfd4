"""The ways to answer a prompt that are measured side by side.

All of them are greedy, stop at the same tokens and count tokens from ids.
"""

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import GenerationConfig

from medusa_exp.decode.loop import Decoded, decode_plain, decode_tree
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.tree import Tree

Method = Callable[[list[int]], Decoded]

_LOOKUP_TOKENS = 10
"""Tokens that prompt lookup copies at a time: what the documentation of transformers suggests."""


def build_methods(
    backbone: Backbone,
    heads: MedusaHeads,
    tree: Tree,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    baselines: list[str],
) -> dict[str, Method]:
    """Return name -> method: plain and tree, and the baselines asked for."""
    limits: Any = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    methods: dict[str, Method] = {
        "plain": lambda ids: decode_plain(backbone, ids, **limits),
        "tree": lambda ids: decode_tree(backbone, heads, tree, ids, **limits),
        "hf_generate": lambda ids: hf_generate(backbone, ids, **limits),
        "prompt_lookup": lambda ids: hf_generate(
            backbone, ids, **limits, prompt_lookup_num_tokens=_LOOKUP_TOKENS
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
) -> Decoded:
    """Answer with `model.generate`; a step is one forward call of the model.

    The accepted lengths within it cannot be seen from outside: only their number is right.
    """
    # A fresh config: a model's own may ask for sampling or for penalties.
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
    handle = backbone.model.register_forward_pre_hook(count)
    try:
        output_1T = backbone.model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings
        )
    finally:
        handle.remove()
    tokens = output_1T[0, len(prompt_ids) :].tolist()
    even, more = divmod(len(tokens), steps)
    return Decoded(tokens, [even + 1] * more + [even] * (steps - more))


def timed(method: Method, prompt_ids: list[int], device: torch.device) -> tuple[Decoded, float]:
    """Return the answer and its wall time in seconds, the prompt's step included."""
    _synchronise(device)
    start = time.perf_counter()
    decoded = method(prompt_ids)
    _synchronise(device)
    return decoded, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
