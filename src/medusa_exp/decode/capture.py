"""Capturing work in a CUDA graph: what libraries need before, what graphs share, what cannot be.

What is captured here is a decoding step (step.py); nothing here knows that.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch

_WARM_UPS = 3
"""Runs before capture: libraries choose and allocate at their first calls."""


class GraphPool:
    """The memory that graphs work in, one at a time: as much as the largest needs.

    torch gives a pool up with the last graph in it, and captures nothing in it from then on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """All captures run on one stream of the device, which need not be the current device."""
        return torch.cuda.Stream(self.device)

    @contextmanager
    def handle(self) -> Iterator[Any]:
        """Lend what a capture is told: the pool of a graph that is there, or a new one."""
        graph = next(iter(self._graphs), None)  # held until the capture has begun, and after
        yield torch.cuda.graph_pool_handle() if graph is None else graph.pool()

    def add(self, graph: torch.cuda.CUDAGraph) -> None:
        """Remember a graph that was captured in it, for as long as that lives."""
        self._graphs.add(graph)


def capture(
    work: Callable[[], None],
    pool: GraphPool,
    register: Callable[[torch.cuda.CUDAGraph], None],
) -> torch.cuda.CUDAGraph | None:
    """Do some work a few times, and capture it in a graph.

    None if it waits for the host somewhere: no graph can hold that.

    Args:
        work: of fixed shapes, on the pool's device.
        pool: where the graph works.
        register: is given the graph before the capture, to say which generators it draws from.
    """
    with torch.cuda.device(pool.device):
        before = torch.cuda.current_stream()
        pool.stream.wait_stream(before)
        with torch.cuda.stream(pool.stream):
            for _ in range(_WARM_UPS):
                work()
            waits = _waits_for_host(work)
        before.wait_stream(pool.stream)
        if waits:
            return None
        graph = torch.cuda.CUDAGraph()
        register(graph)
        # What other threads do meanwhile (a server sends the next prompt) must not break it.
        options = {"stream": pool.stream, "capture_error_mode": "thread_local"}
        with pool.handle() as handle, torch.cuda.graph(graph, pool=handle, **options):
            work()
        pool.add(graph)
    return graph


def _waits_for_host(work: Callable[[], None]) -> bool:
    """Do some work; return whether torch tells of a wait.

    Its debug mode holds for all threads. So it is asked to warn: an error would stop others.
    """
    here, waits = threading.get_ident(), []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", message="called a synchronizing")
        show = warnings.showwarning

        def note(message: Any, *given: Any, **named: Any) -> None:
            if not str(message).startswith("called a synchronizing"):
                show(message, *given, **named)
            elif threading.get_ident() == here:
                waits.append(message)

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return bool(waits)
