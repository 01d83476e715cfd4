"""Decoding as the product does it: milliseconds of a step, tokens a second, regeneration.

A step is what happens between two waits for the device: draft, backbone on the tree, verification,
commit. Its time is the median of `Response.step_seconds`, the first steps left out. A tree of one
node is plain decoding. Nothing here is a step of its own making.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from gpu.models import Scale, heads_with_hit_rates, random_llama
from gpu.points import tree_of
from torch import nn

from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.loop import Limits, Response
from medusa_exp.decode.slots import Request
from medusa_exp.model import Backbone, build_heads
from medusa_exp.runs.machine import synchronize
from medusa_exp.tree import chain

WARM_UP = 4
WARM_UP_TOKENS = 4
"""Last tokens of each prompt that the warm-up of regeneration answers."""
KINDS = {"7B": "medusa", "8B": "medusa_tied"}
"""Family of the heads: tied ones where the vocabulary is large."""
HIT_RATES = (0.60, 0.40, 0.28, 0.20)
"""First choices of Medusa-1's heads that are right, about: with them a tree of 64 nodes takes 2.4
to 2.5 tokens a step, which is what Spec-Bench's leaderboard has for Medusa (2.39)."""

IsOver = Callable[[], bool]
Found = Iterator[tuple[str, Any]]
"""Name and figures, as they come."""


def decoder_of(
    backbone: Backbone, heads: nn.Module | None, nodes: int, scale: Scale, compiles: bool
) -> Decoder:
    """Return a decoder with captured steps (on a CPU the same code uncaptured)."""
    decoder = Decoder(backbone, heads, tree_of(nodes), cuda_graph=True)
    if compiles:
        decoder.layers = CompiledLayers(backbone, scale.backend)
    return decoder


def measure_steps(name: str, scale: Scale, is_over: IsOver) -> Found:
    """Yield "B=1, 16 nodes, compiled" and the like, and milliseconds of a step; eager ones last."""
    backbone = random_llama(scale.shapes[name], scale)
    heads = build_heads(backbone, num_heads=tree_of(max(scale.nodes)).depth, kind=KINDS[name])
    heads = heads.to(backbone.device)
    decoders = {way: decoder_of(backbone, heads, 64, scale, way) for way in (True, False)}
    yield "weights_gigabytes", _gigabytes(backbone)
    for (compiles, decoder), batch, nodes in product(decoders.items(), scale.batches, scale.nodes):
        told = f"B={batch}, {nodes} nodes, {'compiled' if compiles else 'eager'}"
        if is_over():
            yield "left_out", f"from {told} on"
            break
        yield told, step_milliseconds(decoder, batch, nodes, scale)
    compiled = decoders[True].layers
    if compiled is not None:
        yield "compilation_seconds", compiled.seconds
        yield "compiled_graphs", compiled.num_graphs
        yield "compiled_layers_refused", compiled.is_refused


def step_milliseconds(decoder: Decoder, batch: int, nodes: int, scale: Scale) -> float:
    """Return the median of a step after `scale.past` tokens and some."""
    prompts = torch.randint(decoder.backbone.vocab_size, (batch, scale.past)).tolist()
    tree = tree_of(nodes)
    limits = Limits(scale.steps * (1 + tree.depth))
    if nodes == 1:
        responses = decoder.decode_plain(prompts, limits)
    else:
        responses = decoder.decode(prompts, limits, tree=tree)
    longest = max(responses, key=lambda response: len(response.step_seconds))
    return statistics.median(longest.step_seconds[WARM_UP : scale.steps]) * 1e3


def measure_generate(name: str, scale: Scale, is_over: IsOver) -> Found:
    """Yield milliseconds a token of transformers' `generate`: growing cache; static, compiled."""
    backbone = random_llama(scale.shapes[name], scale)
    ways: dict[str, dict[str, Any]] = {"dynamic": {}}
    if not scale.is_rehearsal:  # which would want a C++ compiler
        ways["static, compiled"] = {"cache_implementation": "static"}
    for way, options in ways.items():
        if is_over():
            yield "left_out", way
            return
        start = time.perf_counter()
        _generate(backbone, scale, 8, options)
        yield f"{way}, first call, s", time.perf_counter() - start
        yield way, _milliseconds_of_generate(backbone, scale, options)


def _milliseconds_of_generate(backbone: Backbone, scale: Scale, options: dict[str, Any]) -> float:
    short, long = 8, 8 + scale.steps
    seconds = []
    for new_tokens in (short, long):
        _generate(backbone, scale, new_tokens, options)
        start = time.perf_counter()
        _generate(backbone, scale, new_tokens, options)
        synchronize(backbone.device)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (long - short) * 1e3


@torch.inference_mode()
def _generate(
    backbone: Backbone, scale: Scale, new_tokens: int, options: dict[str, Any]
) -> torch.Tensor:
    ids_1T = torch.randint(backbone.vocab_size, (1, scale.past), device=backbone.device)
    found: torch.Tensor = backbone.model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return found


def measure_speedup(
    name: str, scale: Scale, is_over: IsOver, rates: Sequence[float] = HIT_RATES
) -> Found:
    """Yield tokens a second of heads with these hit rates: plainly, by a chain, by trees."""
    backbone = random_llama(scale.shapes[name], scale)
    heads = heads_with_hit_rates(backbone, rates)
    yield "hit_rates", list(rates)
    trees = {"plain": None, "chain": chain(len(rates)), "16 nodes": tree_of(16)}
    trees["64 nodes"] = tree_of(64)
    prompts = [torch.randint(backbone.vocab_size, (scale.past,)).tolist() for _ in range(3)]
    for compiles in (True, False):
        decoder = decoder_of(backbone, heads, 64, scale, compiles)
        expected = [decoder.decode_plain([p], Limits(scale.new_tokens))[0].tokens for p in prompts]
        for told, tree in trees.items():
            if is_over():
                yield "left_out", f"{told}, {'compiled' if compiles else 'eager'}"
                return
            limits = Limits(scale.new_tokens)

            def respond(prompt: list[int], tree: Any = tree, limits: Limits = limits) -> Response:
                if tree is None:
                    return decoder.decode_plain([prompt], limits)[0]  # noqa: B023
                return decoder.decode([prompt], limits, tree=tree)[0]  # noqa: B023

            respond(prompts[0])  # captures
            start = time.perf_counter()
            responses = [respond(prompt) for prompt in prompts]
            seconds = time.perf_counter() - start
            tokens = sum(len(response.tokens) for response in responses)
            yield (
                f"{told}, {'compiled' if compiles else 'eager'}",
                {
                    "tokens_per_second": tokens / seconds,
                    "tokens_per_step": tokens / sum(len(r.accept_lengths) for r in responses),
                    "identical": [r.tokens for r in responses] == expected,
                },
            )


def measure_regeneration(name: str, scale: Scale, is_over: IsOver) -> Found:
    """Yield tokens a second of `regenerate`'s slots: plainly, and with heads.

    Responses end where one token in two hundred does, or at the limit; the longest prompt comes
    first, and each request has room for its own prompt and response, as in the stage. What is
    compiled and captured is so before the clock runs: all are answered twice.
    """
    backbone = random_llama(scale.shapes[name], scale)
    heads = heads_with_hit_rates(backbone, HIT_RATES)
    decoder = decoder_of(backbone, heads, 64, scale, True)
    torch.manual_seed(1)
    stop_ids = frozenset(torch.randperm(backbone.vocab_size)[: backbone.vocab_size // 200].tolist())
    limits = Limits(scale.new_tokens, stop_ids)
    lengths = torch.randint(scale.past // 8, scale.past, (scale.documents,)).tolist()
    lengths.sort(reverse=True)
    prompts = [torch.randint(backbone.vocab_size, (length,)).tolist() for length in lengths]

    def answered(drafter: Drafter, num_last: int) -> tuple[int, float]:
        """Answer the last so many tokens of each prompt; return the tokens, and the idle share."""
        slots = decoder.slots(scale.slots, scale.past + scale.new_tokens, drafter)
        requests = (Request(p[-num_last:], limits, len(p) + scale.new_tokens) for p in prompts)
        tokens = sum(len(finished.response.tokens) for finished in slots.decode(requests))
        return tokens, slots.idle_share

    for told, drafter in (
        ("plain", decoder.root_only()),
        ("chain", decoder.drafter(chain(2))),
        ("5 nodes", decoder.drafter(tree_of(5))),
    ):
        if is_over():
            yield "left_out", told
            return
        # Such a model continues from the last token alone: short prompts give the same answers, and
        # steps of the same sizes are captured.
        answered(drafter, WARM_UP_TOKENS)
        start = time.perf_counter()
        tokens, idle_share = answered(drafter, scale.past)
        seconds = time.perf_counter() - start
        yield (
            told,
            {
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
                "tokens": tokens,
                "prompt_tokens": sum(lengths),
                "idle_share": idle_share,
                "batch": scale.slots,
            },
        )


def _gigabytes(backbone: Backbone) -> float:
    """Return what a step reads of the weights: all but the embedding, unless it is the lm_head."""
    weights = {id(p): p.nbytes for p in backbone.model.parameters()}
    embedding = backbone.model.get_input_embeddings().weight
    if embedding is not backbone.lm_head.weight:
        del weights[id(embedding)]
    return sum(weights.values()) / 1e9
