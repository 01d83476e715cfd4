"""The emulated GPU: its memory, what is being captured, and what a replay does.

Memory of the device is memory of the host (cudart.cpp), so that over the bytes of each CUDA tensor
there can lie a CPU tensor. As on a GPU, within a capture nothing is computed: what is to be done is
kept, and a replay does it on the same addresses. What makes the host wait is refused within a
capture, and under `torch.cuda.set_sync_debug_mode("error")`.
"""

import ctypes
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
RUNTIME = ctypes.CDLL(None)  # cudart.cpp, which was loaded before all else
RUNTIME.emulated_last_graph.restype = ctypes.c_ulonglong

ran: Counter[str] = Counter()
"""Operations and kernels that ran or were captured, by name."""
recording: list[Callable[[], Any]] = []
"""Of the capture that is under way."""
graphs: dict[int, list[Callable[[], Any]]] = {}
"""What replays of each graph run."""
registered: dict[int, set[int]] = {}
"""Generators that were registered with a graph, by its id; of the one that is captured under 0."""


def is_capturing() -> bool:
    """Is a graph being captured?"""
    return bool(RUNTIME.emulated_is_capturing())


def run_or_record(work: Callable[[], Any]) -> None:
    """Do something, or keep it for the replays of the graph that is being captured."""
    if is_capturing():
        recording.append(work)
    else:
        work()


def on_host(value: Any) -> Any:
    """Return a CPU tensor over the bytes of a CUDA tensor; the host's for the device; else same."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if not is_cuda(value):
        return value
    bytes_ = value.untyped_storage()
    if not bytes_.nbytes():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    there = torch._C._construct_storage_from_data_pointer(bytes_.data_ptr(), CPU, bytes_.nbytes())
    empty = torch.empty(0, dtype=value.dtype)
    return empty.set_(there, value.storage_offset(), value.size(), value.stride())


def check_waiting(what: str) -> None:
    """Raise what CUDA and torch raise where the host would wait, and must not."""
    if is_capturing():
        RUNTIME.emulated_spoil()
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    mode = torch.cuda.get_sync_debug_mode()
    if mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
    if mode == 1:
        warnings.warn(f"called a synchronizing CUDA operation ({what})", stacklevel=3)


def is_cuda(value: Any) -> bool:
    """Is this a tensor on the device?"""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def empty_on_device(like: Tensor) -> Tensor:
    """Return a CUDA tensor of the same sizes, strides and dtype."""
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=CUDA)


def to_device(value: Tensor) -> Tensor:
    """Return a copy on the device."""
    told = empty_on_device(value)
    if value.numel():
        on_host(told).copy_(value)
    return told


def held_by_graph(value: Any) -> Any:
    """Return what a graph keeps of an argument: of the host's numbers, what they are now."""
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        default = torch.cuda.default_generators[0]
        if value._cdata not in registered.get(0, set()) | {default._cdata}:
            raise RuntimeError("the CUDA generator was not registered with the graph")
        return value
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return value.clone()
    return on_host(value)


def generator_of(value: Any) -> Any:
    """Return a CPU generator for a CUDA one where that stands now, and move that on."""
    if not isinstance(value, torch.Generator) or value.device.type != "cuda":
        return value
    offset = value.get_offset()
    value.set_offset(offset + 64)
    return torch.Generator().manual_seed(hash((value.initial_seed(), offset)) % 2**62)


def _end(self: torch.cuda.CUDAGraph) -> None:
    _capture_end(self)
    graphs[RUNTIME.emulated_last_graph()] = [*recording]
    recording.clear()


def _begin(self: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
    recording.clear()
    registered[0] = registered.pop(id(self), set())
    _capture_begin(self, *args, **kwargs)


def _register(self: torch.cuda.CUDAGraph, generator: torch.Generator) -> None:
    _register_generator(self, generator)
    registered.setdefault(id(self), set()).add(generator._cdata)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _record(event: int) -> None:
    recording.append(lambda: RUNTIME.emulated_set_time(ctypes.c_void_p(event)))


@ctypes.CFUNCTYPE(None, ctypes.c_ulonglong)
def _replay(graph: int) -> None:
    try:
        with torch.inference_mode():
            for again in graphs[graph]:
                again()
    except BaseException:  # an error of a device ends all; from here none would reach the caller
        traceback.print_exc()
        os._exit(1)


_capture_begin, _capture_end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end
torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = _begin, _end  # type: ignore
_register_generator = torch.cuda.CUDAGraph.register_generator_state
torch.cuda.CUDAGraph.register_generator_state = _register  # type: ignore[method-assign]
torch.cuda._sleep = lambda cycles: None  # no stream is ever behind
RUNTIME.emulated_replay_by(_replay)
RUNTIME.emulated_record_by(_record)
