"""Verification at a point of the grid: every launch and every rival, judged and timed.

What fails is written down, and the rest goes on. B batch, N tree nodes, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from gpu.points import (
    KERNELS,
    RULES,
    Inputs,
    Point,
    configs_of,
    figures,
    floors_us,
    make_inputs,
    name_of,
    points,
)
from gpu.timing import measure, num_copies
from rivals.verification import SplitWalk, compiled, eager, options_of

from medusa_exp.decode.cuda.launch import launch_config
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.verify import Verdict, verify

NEAR = 1e-6
"""So near to a token's edge, a float32 draw may fall on the other side."""
FIELDS = ("path_BL", "num_accepted_B", "next_token_B")

Method = Callable[[Inputs], Callable[[], Verdict]]
SOME = ((1, 32000), (1, 128256), (16, 128256), (64, 128256))
"""Batch and vocabulary of some points, with all kernels and 64 nodes."""
FEW = ((1, 300), (2, 300))
"""The same of a rehearsal."""
COMPILED_BATCHES = (8, 64, 1)
"""For one compilation serves all batches but 1."""


def measure_some(
    kernels: Kernels, is_over: Callable[[], bool], some: Sequence[tuple[int, int]] = SOME
) -> Iterator[tuple[str, Any]]:
    """Yield the time of the chosen launch at some points: in a graph, with cold caches."""
    cache_bytes = 1
    if kernels.device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(kernels.device).L2_cache_size
    for (batch, vocab), rule in itertools.product(some, KERNELS):
        if is_over():
            yield "left_out", f"from {rule}, B={batch}, V={vocab} on"
            return
        entry = measure_point(kernels, Point(rule, batch, vocab, 64), cache_bytes, only_chosen=True)
        time = entry["times_us"].get(entry["chosen_config"], {}).get("graph_cold")
        yield f"{rule}, B={batch}, V={vocab}", {"microseconds": time, **entry}
        release()


def measure_grid(kernels: Kernels, is_over: Callable[[], bool]) -> Iterator[tuple[str, Any]]:
    """Yield every point of the grid with every launch and rival, then torch.compile's times."""
    cache_bytes = torch.cuda.get_device_properties(kernels.device).L2_cache_size
    entries: list[dict[str, Any]] = []
    split_walk = None
    with suppress(Exception):  # without the compiler that it needs, there is one rival fewer
        split_walk = SplitWalk()
    for point in points():
        if is_over():
            yield "left_out", f"from {point} on"
            return
        try:
            entries.append(measure_point(kernels, point, cache_bytes, split_walk))
        except Exception as error:
            entries.append({**asdict(point), "failed": told(error)})
        yield "grid", entries
        release()
    yield "compiled", [*_compiled(kernels, entries, is_over)]


def _compiled(
    kernels: Kernels, entries: list[dict[str, Any]], is_over: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # beyond it, calls would silently be eager
    for rule, batch in itertools.product(RULES, COMPILED_BATCHES):
        if not is_over():
            yield measure_compiled(kernels, Point(rule, batch, 128256, 64), entries)
            release()


def release() -> None:
    """Give memory back; after a fault on the device even that fails, and nobody is to stop."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def measure_point(
    kernels: Kernels,
    point: Point,
    cache_bytes: int,
    split_walk: Any = None,
    *,
    only_chosen: bool = False,
) -> dict[str, Any]:
    """Return a point's entry of the JSON.

    Args:
        kernels: where to run.
        point: what.
        cache_bytes: size of the device's L2 cache.
        split_walk: the rival `split`; None leaves it out.
        only_chosen: leave out the launches that would not be chosen, and the rivals.
    """
    inputs = make_inputs(point, kernels.device)
    copies = [inputs]
    while len(copies) < num_copies(inputs.logits_BNV.nbytes, cache_bytes):
        copies.append(make_inputs(point, kernels.device))
    right = expected(point, inputs)
    times: dict[str, dict[str, float]] = {}
    differs: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}

    def add(name: str, method: Method, **how: Any) -> None:
        try:
            calls = [method(copy) for copy in copies]
            if found := differences(point, inputs, calls[0](), right):
                differs[name] = found
            times[name] = measure(calls, **how)
        except Exception as error:
            failed[name] = told(error)

    chosen = launch_config(point.batch, point.vocab * point.itemsize, kernels)
    for config in [chosen] if only_chosen else configs_of(chosen, kernels):
        add(name_of(config), ours(point, KernelVerify(kernels, config)))
    few = {"repeats": 3, "at_least": 5}
    if not only_chosen:
        add("eager", lambda copy: eager(point, copy), **few)
    if split_walk is not None and point.rule in ("greedy", "sampling"):
        add("split", lambda copy: split_walk(point, copy), **few)
    entry = figures(point, floors_us(point, inputs.tree, inputs.accepted_B), times)
    return {**entry, "chosen_config": name_of(chosen), "differs": differs, "failed": failed}


def measure_compiled(
    kernels: Kernels, point: Point, entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the times of the rival `compiled`, which takes long, beside those of the grid."""
    try:
        call = compiled(point, make_inputs(point, kernels.device))
        times = measure([call], repeats=3, at_least=5, with_graph=False)
    except Exception as error:
        return {**asdict(point), "failed": told(error)}
    result = {**asdict(point), "times_us": {"compiled": times}}
    place = asdict(point).items()
    for entry in entries:
        if place <= entry.items() and "best_config" in entry:
            time_us = entry["times_us"][entry["best_config"]]["graph_warm"]
            result["times_as_fast_as_compiled_warm"] = times["eager_warm"] / time_us
    return result


def ours(point: Point, verifier: KernelVerify) -> Method:
    """Return the kernels as a method."""

    def method(copy: Inputs) -> Callable[[], Verdict]:
        options = options_of(point, copy)
        return lambda: verifier(copy.logits_BNV, copy.tokens_BN, copy.parents_BN, **options)

    return method


def told(error: Exception) -> str:
    """Return an error in a line or a few."""
    return f"{type(error).__name__}: {error}"[:2000]


def expected(point: Point, inputs: Inputs) -> Verdict:
    """Return what the specification says in float64; a sequence at a time, to save memory."""
    verdicts = [expected_of_row(point, inputs, b) for b in range(point.batch)]
    return Verdict(*(torch.cat([getattr(v, field) for v in verdicts]) for field in FIELDS))


def expected_of_row(point: Point, inputs: Inputs, b: int, step: float = 0.0) -> Verdict:
    """Return the verdict on one sequence; `step` is added to the root's number to draw by."""
    options, row = options_of(point, inputs), slice(b, b + 1)
    if "uniforms_BN" in options:
        uniforms_1N = inputs.uniforms_BN[row].double()
        uniforms_1N[:, 0] = (uniforms_1N[:, 0] + step).clamp(0, 1 - 1e-16)
        options["uniforms_BN"] = uniforms_1N
    if inputs.drawn is not None:
        options["drawn"] = replace(inputs.drawn, q_BQW=inputs.drawn.q_BQW[row].double())
    logits_1NV = inputs.logits_BNV[row].double()
    return verify(logits_1NV, inputs.tokens_BN[row], inputs.parents_BN[row], **options)


def differences(point: Point, inputs: Inputs, found: Verdict, right: Verdict) -> dict[str, int]:
    """Count the sequences that are judged otherwise; empty if there are none.

    near: those whose draw stands at an edge between tokens, so that float32 may decide otherwise.
    """
    same_path_B = (found.path_BL == right.path_BL).all(1)
    same_path_B &= found.num_accepted_B == right.num_accepted_B
    is_same_B = same_path_B & (found.next_token_B == right.next_token_B)
    odd = (~is_same_B).nonzero()[:, 0].tolist()
    near = 0
    for b in odd:
        token = int(found.next_token_B[b])
        if point.rule == "sampling" and same_path_B[b]:
            end = int(right.path_BL[b, int(right.num_accepted_B[b])])
            near += is_near(inputs, b, end, token)
        if point.rule == "traversal" and same_path_B[b]:  # the root's number draws, over all paths
            edges = [int(expected_of_row(point, inputs, b, s).next_token_B) for s in (-NEAR, NEAR)]
            near += edges[0] <= token <= edges[1]
    return {"sequences": len(odd), "near": near} if odd else {}


def is_near(inputs: Inputs, b: int, node: int, token: int) -> bool:
    """Say whether a draw after a node might be this token but for rounding."""
    p_V = probabilities(inputs.logits_BNV[b, node].double(), 1.0)
    children = inputs.tokens_BN[b, inputs.parents_BN[b] == node].unique()
    place = inputs.uniforms_BN[b, node].double() - p_V[children].sum()
    p_V[children] = 0.0
    end = p_V[: token + 1].sum()
    return bool((p_V[token] > 0) & (end - p_V[token] - NEAR <= place) & (place <= end + NEAR))
