"""Microseconds of a call: eager and in a CUDA graph, with warm and with cold caches.

Without a GPU, in a rehearsal, calls are what graphs are else, by the host's clock.

Cold: calls go round copies of the inputs that are together thrice as large as the L2 cache. The
figure is the median over repeats of the time of a round, divided by its calls.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
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
        again = partial(_each, some)
        times[f"eager_{heat}"] = _median_us(again, repeats) / len(some)
        if with_graph:
            replay = _captured(some) if torch.cuda.is_available() else again
            times[f"graph_{heat}"] = _median_us(replay, repeats) / len(some)
            del replay
    return times


def _each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _captured(calls: Sequence[Call]) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _each(calls[:2])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _each(calls)
    return graph.replay


def _median_us(run: Call, repeats: int) -> float:
    run()
    if not torch.cuda.is_available():
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e6
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
