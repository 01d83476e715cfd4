"""Kernels for drafts, and the filter: each timed beside what torch does in its place.

B batch, M rows of a sequence, R draft tokens of a row, W tokens that heads can propose, N nodes, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu.points import configs_of, name_of
from gpu.timing import measure
from gpu.verification import SOME, release, told

from medusa_exp.decode.cuda.draws import KernelDraw
from medusa_exp.decode.cuda.filter import KernelFilter, filter_config
from medusa_exp.decode.cuda.launch import launch_config
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.topk import KernelTopK
from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.sampled import draw

DRAWS = (4, 3)
"""Distributions of a depth, and draws from each."""


def measure_draws(
    kernels: Kernels, is_over: Callable[[], bool], some: Sequence[tuple[int, int]] = SOME
) -> Iterator[tuple[str, Any]]:
    """Yield the times of draws from random distributions, by the kernel and by torch."""
    for batch, vocab in some:
        if is_over():
            yield "draws_left_out", f"from B={batch}, W={vocab} on"
            return
        generator = torch.Generator(kernels.device).manual_seed(0)
        made = {"generator": generator, "device": kernels.device}
        q_BMW = torch.randn(batch, DRAWS[0], vocab, **made).softmax(-1)
        uniforms_BMR = torch.rand(batch, *DRAWS, **made)
        by_kernel = KernelDraw(kernels)
        right = draw(q_BMW.double(), uniforms_BMR.double())
        times_us = {
            name: measure([partial(function, q_BMW, uniforms_BMR)])
            for name, function in (("kernel", by_kernel), ("torch", draw))
        }
        yield (
            f"draws, B={batch}, W={vocab}",
            {
                "microseconds": times_us["kernel"]["graph_warm"],
                "times_us": times_us,
                "draws_otherwise": int((by_kernel(q_BMW, uniforms_BMR) != right).sum()),
                "of": right.numel(),
            },
        )
        release()


FILTERED = (16, 0.7, 20, 0.8)
"""Nodes, temperature, top-k and top-p."""


def measure_filters(
    kernels: Kernels, is_over: Callable[[], bool], some: Sequence[tuple[int, int]] = SOME
) -> Iterator[tuple[str, Any]]:
    """Yield the times of filtering random logits, by the kernel and by torch."""
    nodes, *filters = FILTERED
    for batch, vocab in some:
        if is_over():
            yield "filters_left_out", f"from B={batch}, V={vocab} on"
            return
        generator = torch.Generator(kernels.device).manual_seed(0)
        made = {"generator": generator, "device": kernels.device, "dtype": torch.bfloat16}
        logits_BNV = 3 * torch.randn(batch, nodes, vocab, **made)
        chosen = filter_config(batch * nodes, vocab, kernels)
        configs = configs_of(chosen, kernels) if kernels.device.type == "cuda" else [chosen]
        methods: dict[str, Callable[[], Any]] = {
            name_of(config): partial(KernelFilter(kernels, config), logits_BNV, *filters)
            for config in configs
        }
        by_kernel = methods[name_of(chosen)]
        temperature, *_ = filters
        methods["kernel and softmax"] = lambda: probabilities(by_kernel(), temperature)  # noqa: B023
        methods["torch"] = partial(probabilities, logits_BNV, *filters)
        yield f"filter, B={batch}, V={vocab}", _timed(methods, name_of(chosen))
        release()


DRAFTED = (4, 10)
"""Rows of a sequence, and the likeliest tokens of each."""


def measure_topk(
    kernels: Kernels, is_over: Callable[[], bool], some: Sequence[tuple[int, int]] = SOME
) -> Iterator[tuple[str, Any]]:
    """Yield the times of drafting random rows' likeliest tokens, by the kernel and by torch."""
    rows, ranks = DRAFTED
    for batch, width in some:
        if is_over():
            yield "topk_left_out", f"from B={batch}, W={width} on"
            return
        generator = torch.Generator(kernels.device).manual_seed(0)
        made = {"generator": generator, "device": kernels.device, "dtype": torch.bfloat16}
        logits_BMW = torch.randn(batch, rows, width, **made)
        places_N = torch.arange(rows * ranks, device=kernels.device)
        tokens_BN = torch.zeros(batch, rows * ranks, dtype=torch.long, device=kernels.device)
        chosen = launch_config(batch * rows, width * logits_BMW.itemsize, kernels)
        configs = configs_of(chosen, kernels) if kernels.device.type == "cuda" else [chosen]
        given = tokens_BN, logits_BMW, places_N, ranks
        methods: dict[str, Callable[[], Any]] = {
            name_of(config): partial(KernelTopK(kernels, config), *given) for config in configs
        }
        methods["torch"] = partial(_by_torch, *given)
        entry = _timed(methods, name_of(chosen))
        entry["ranks_otherwise"] = _other_ranks(KernelTopK(kernels), *given)
        yield f"topk, B={batch}, W={width}", entry
        release()


def _by_torch(
    tokens_BN: torch.Tensor, logits_BMW: torch.Tensor, places_N: torch.Tensor, ranks: int
) -> None:
    tokens_BN.copy_(logits_BMW.topk(ranks).indices.flatten(1)[:, places_N])


def _other_ranks(
    topk: KernelTopK,
    tokens_BN: torch.Tensor,
    logits_BMW: torch.Tensor,
    places_N: torch.Tensor,
    ranks: int,
) -> int:
    """Count the ranks whose logits are not those of torch's; tokens that tie may change places."""
    topk(tokens_BN.fill_(0), logits_BMW, places_N, ranks)
    found_BMR = tokens_BN.unflatten(1, (logits_BMW.shape[1], ranks))
    found = logits_BMW.gather(2, found_BMR)
    are_twice = (found_BMR.sort(-1).values.diff(dim=-1) == 0).sum()
    return int((found != logits_BMW.topk(ranks).values).sum() + are_twice)


def _timed(methods: dict[str, Callable[[], Any]], chosen: str) -> dict[str, Any]:
    """Return the times of methods, and of the launch that would be chosen among them."""
    times_us: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for name, method in methods.items():
        try:
            times_us[name] = measure([method], repeats=3, at_least=5)
        except Exception as error:
            failed[name] = told(error)
    return {
        "microseconds": times_us.get(chosen, {}).get("graph_warm"),
        "times_us": times_us,
        "chosen_config": chosen,
        "failed": failed,
    }
