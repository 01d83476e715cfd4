"""Microseconds of a call: eager and in a CUDA graph, with warm and with cold caches.

Cold: calls go round copies of the inputs that are together thrice as large as the L2 cache. The
figure is the median over repeats of the time of a round, divided by its calls.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def num_copies(bytes_of_one: int, cache_bytes: int, most: int = 64) -> int:
    """Return how many copies of an input pass thrice the size of the cache."""
    return max(1, min(most, -(-3 * cache_bytes // max(1, bytes_of_one))))


def measure(
    calls: Sequence[Call], *, repeats: int = 7, at_least: int = 20, with_graph: bool = True
) -> dict[str, float]:
    """Return medians of microseconds a call.

    Args:
        calls: the same work on different copies of the inputs.
        repeats: rounds that are timed.
        at_least: calls of a round.
        with_graph: whether the calls can be captured.
    """
    filled = list(calls) * max(1, at_least // len(calls))
    rounds = {"warm": [calls[0]] * at_least, "cold": filled}
    times: dict[str, float] = {}
    for heat, some in rounds.items():
        times[f"eager_{heat}"] = _median_us(
            lambda some=some: [call() for call in some], repeats
        ) / len(some)
        if with_graph:
            graph = _captured(some)
            times[f"graph_{heat}"] = _median_us(graph.replay, repeats) / len(some)
            del graph
    return times


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _median_us(run: Call, repeats: int) -> float:
    run()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1000)
    return statistics.median(taken)
