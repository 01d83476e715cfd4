"""Decode steps of a 7B-shaped Llama of random weights, as the product runs them.

A step is what `decode.loop` does between two waits for the device: draft, backbone on the tree,
verification, commit. Its time is the median of `Response.step_seconds`, the first steps left out.
It is measured captured in a CUDA graph with the kernels (the default on a GPU), captured with
torch's verification, and eager; a tree of one node is plain decoding.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu.points import Point, make_inputs, tree_of
from gpu.timing import measure
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.verify import verify
from medusa_exp.model import Backbone, build_heads

PAST, VOCAB = 512, 32000
NODES = (1, 16, 64)
STEPS, WARM_UP = 24, 4
WAYS = {
    "captured": (True, AcceptanceRule()),
    "captured_torch": (True, AcceptanceRule(verifier="torch")),
    "eager": (False, AcceptanceRule()),
}


def random_llama(device: torch.device) -> Backbone:
    """Return a model of Llama-2-7B's shape in bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return Backbone(model.eval().requires_grad_(False))


def measure_steps(
    kernels: Kernels, backbone: Backbone, batches: tuple[int, ...], is_over: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Return figures for each batch size and tree size."""
    heads = build_heads(backbone, num_heads=tree_of(max(NODES)).depth)
    found: list[dict[str, Any]] = []
    for batch in batches:
        for nodes in NODES:
            place = {"batch": batch, "past": PAST, "nodes": nodes, "vocab": backbone.vocab_size}
            if is_over():
                found.append({**place, "left_out": "no time left"})
                continue
            steps = {
                name: step_us(backbone, heads, batch, nodes, *way) for name, way in WAYS.items()
            }
            alone = verification_us(kernels, batch, nodes, backbone.vocab_size)
            share = alone["kernels"]["graph_warm"] / steps["captured"]
            found.append(
                {**place, "step_us": steps, "verification_us": alone, "verification_share": share}
            )
    return found


def step_us(
    backbone: Backbone,
    heads: nn.Module,
    batch: int,
    nodes: int,
    is_captured: bool,
    rule: AcceptanceRule,
) -> float:
    """Return the median of microseconds of a step after PAST tokens and some."""
    prompts = torch.randint(backbone.vocab_size, (batch, PAST)).tolist()
    limits = Limits(STEPS * (1 + tree_of(nodes).depth))
    decoder = Decoder(backbone, heads, tree_of(nodes), rule, cuda_graph=is_captured)
    responses = decoder.decode(prompts, limits)
    longest = max(responses, key=lambda response: len(response.step_seconds))
    return statistics.median(longest.step_seconds[WARM_UP:STEPS]) * 1e6


def verification_us(
    kernels: Kernels, batch: int, nodes: int, vocab_size: int
) -> dict[str, dict[str, float]]:
    """Return the time of the verification alone, on logits of the same shape."""
    inputs = make_inputs(Point("greedy", batch, vocab_size, nodes), kernels.device)
    arguments = (inputs.logits_BNV, inputs.tokens_BN, inputs.parents_BN)
    by_kernels, depth = KernelVerify(kernels), inputs.tree.depth
    return {
        "kernels": measure([lambda: by_kernels(*arguments, max_depth=depth)]),
        "torch": measure([lambda: verify(*arguments, max_depth=depth)]),
    }
