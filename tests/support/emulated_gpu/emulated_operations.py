"""What an emulated GPU computes: each of torch's operations on CUDA tensors, by torch's CPU kernel.

Memory of the device is memory of the host (cudart.cpp), so that over the bytes of each CUDA tensor
there can lie a CPU tensor. Here every operation that has a CUDA kernel is given another: one that
does its work on such tensors. Views, allocations and all that autograd, autocast and composite
operations do on the way are torch's own, for CUDA.

As on a GPU, within a capture nothing is computed: outputs get the sizes that the meta device tells,
and the operation is kept; a replay runs what was kept, on the same addresses. What makes the host
wait is refused within a capture, and under `torch.cuda.set_sync_debug_mode("error")`. Tensors of
several devices do not mix.
"""

import ctypes
import math
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

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

_KEPT = {
    *("empty.memory_format", "empty_strided", "resize_", "_resize_output_", "record_stream"),
    *("_local_scalar_dense", "is_pinned", "_pin_memory", "_fused_sdp_choice", "view"),
    *("as_strided", "_reshape_alias", "unfold", "set_", "set_.source_Storage"),
    *("set_.source_Storage_storage_offset", "set_.source_Tensor", "is_set_to"),
}
"""Operations whose CUDA kernels start none on the device."""
_WAITING = {
    *("nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive"),
    *("unique_dim_consecutive", "bincount", "equal", "repeat_interleave.Tensor"),
}
"""Operations for which the host waits: their outputs' sizes are values on the device."""
_INDEXING = {"index.Tensor", "_index_put_impl_", "index_put_", "_unsafe_index.Tensor"}
"""They take indices from the host, and masks, of which they count the true ones: both wait."""


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
    if not _is_cuda(value):
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


class Operation:
    """One overload of an operation, by its CPU kernel on the device's memory."""

    def __init__(self, name: str, overload: Any) -> None:
        self.name, self.overload = name, overload
        self.packet = overload._overloadpacket
        self.arguments = overload._schema.arguments
        self.returns = overload._schema.returns
        self.written = [a.name for a in self.arguments if a.alias_info and a.alias_info.is_write]
        self.out = [a.name for a in self.arguments if a.is_out]
        self.takes_generator = any(a.name == "generator" for a in self.arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute on the host what the CUDA kernel would, or record it."""
        ran[self.name] += 1
        given = dict(zip((a.name for a in self.arguments), args, strict=False)) | kwargs
        self._check(given)
        if self.takes_generator and given.get("generator") is None:
            given["generator"] = torch.cuda.default_generators[0]
        if self.out:
            return self._into(given)
        if is_capturing():
            return self._captured(given)
        return self._told(self._compute(given), given)

    def _check(self, given: dict[str, Any]) -> None:
        if self.name in _WAITING and given.get("output_size") is None:
            check_waiting(self.name)
        checked = given
        if self.name in _INDEXING:
            for index in given["indices"]:
                if index is not None and not index.is_cuda:
                    check_waiting(f"{self.name} by an index on the host")
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    check_waiting(f"{self.name} by a mask")
            checked = {name: value for name, value in given.items() if name != "indices"}
        for value in tree_leaves(checked):
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:0 and cpu! ({self.name})"
                )

    def _compute(self, given: dict[str, Any]) -> Any:
        """Run the CPU kernel on what the device has in memory now."""
        return self._run(tree_map(lambda value: _generator_of(on_host(value)), given))

    def _run(self, given: dict[str, Any]) -> Any:
        positional, named, call, is_complete = [], {}, self.overload, True
        for argument in self.arguments:
            if argument.name not in given:
                is_complete = False
                continue
            value = given[argument.name]
            if argument.kwarg_only or not is_complete:
                named[argument.name] = value
            else:
                positional.append(value)
            if isinstance(value, int | float) and str(argument.type) == "Tensor":
                call = self.packet  # a number where this overload wants a tensor: another's
        return call(*positional, **named)

    def _told(self, found: Any, given: dict[str, Any]) -> Any:
        """Return what was computed as CUDA tensors; arguments that were written as themselves."""
        return self._returned(found, given, _to_device)

    def _returned(self, found: Any, given: dict[str, Any], make: Callable[[Tensor], Tensor]) -> Any:
        if not self.returns:
            return None
        is_one, written = len(self.returns) == 1, iter(self.written)
        told = [
            given[next(written)]
            if returned.alias_info is not None
            else tree_map(lambda v: make(v) if isinstance(v, Tensor) else v, one)
            for returned, one in zip(self.returns, (found,) if is_one else found, strict=True)
        ]
        return told[0] if is_one else tuple(told)

    def _captured(self, given: dict[str, Any]) -> Any:
        is_in_place = all(returned.alias_info is not None for returned in self.returns)
        sizes = (None,) * len(self.returns) if is_in_place else self._sizes(given)
        if is_in_place and len(self.returns) == 1:
            sizes = None
        told = self._returned(sizes, given, _empty_on_device)
        held = tree_map(_held, given)
        made = [] if is_in_place else [on_host(v) for v in tree_leaves(told) if _is_cuda(v)]

        def again() -> None:
            found = self._run(tree_map(_generator_of, held))
            tensors = [value for value in tree_leaves(found) if isinstance(value, Tensor)]
            for target, value in zip(made, tensors, strict=False):
                target.copy_(value)

        recording.append(again)
        return told

    def _sizes(self, given: dict[str, Any]) -> Any:
        """Return tensors of the meta device as the outputs will be."""
        return self._run(tree_map(_to_meta, given))

    def _into(self, given: dict[str, Any]) -> Any:
        """Compute into `out`, which gets the size that it needs."""
        targets = {name: given[name] for name in self.out}
        inputs = {name: value for name, value in given.items() if name not in targets}

        def outputs(device: str) -> dict[str, Tensor]:
            return {n: torch.empty(0, dtype=t.dtype, device=device) for n, t in targets.items()}

        sizes = outputs("meta")
        try:
            self._run(tree_map(_to_meta, inputs) | sizes)
        except (NotImplementedError, RuntimeError) as error:  # sizes that are values
            if "meta" not in str(error).lower():
                raise
            check_waiting(self.name)
            sizes = outputs("cpu")
            self._run(tree_map(lambda v: _generator_of(on_host(v)), inputs) | sizes)
        for name, target in targets.items():
            if target.shape != sizes[name].shape:
                target.resize_(sizes[name].shape)
        held, there = tree_map(_held, inputs), tree_map(on_host, targets)

        def again() -> None:
            found = outputs("cpu")
            self._run(tree_map(_generator_of, held) | found)
            for name, target in there.items():
                target.copy_(found[name])

        run_or_record(again)
        told = [targets[name] for name in self.out]
        return told[0] if len(told) == 1 else tuple(told)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _empty_on_device(like: Tensor) -> Tensor:
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=CUDA)


def _to_device(value: Tensor) -> Tensor:
    told = _empty_on_device(value)
    if value.numel():
        on_host(told).copy_(value)
    return told


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, Tensor) and (value.ndim or value.is_cuda):
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=torch.device("meta")
        )
    return value


def _held(value: Any) -> Any:
    """Return what a graph keeps of an argument: of the host's numbers, what they are now."""
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        default = torch.cuda.default_generators[0]
        if value._cdata not in registered.get(0, set()) | {default._cdata}:
            raise RuntimeError("the CUDA generator was not registered with the graph")
        return value
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return value.clone()
    return on_host(value)


def _generator_of(value: Any) -> Any:
    """Return a CPU generator for a CUDA one where that stands now, and move that on."""
    if not isinstance(value, torch.Generator) or value.device.type != "cuda":
        return value
    offset = value.get_offset()
    value.set_offset(offset + 64)
    return torch.Generator().manual_seed(hash((value.initial_seed(), offset)) % 2**62)


def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy within the device, to it or from it."""
    ran["copy_"] += 1
    if self.device.type != src.device.type and self.numel():
        if not non_blocking:
            check_waiting("a copy to or from the host")
        elif is_capturing() and not (src if self.is_cuda else self).is_pinned():
            check_waiting("a copy of pageable memory")
    target, source = on_host(self), on_host(src)
    run_or_record(lambda: target.copy_(source))
    return self


def assert_async(self: Tensor, message: str = "") -> None:
    """Fail on the device, where the host does not wait for it."""
    value = on_host(self)

    def check() -> None:
        if not value.all():
            raise RuntimeError(f"CUDA error: device-side assert triggered: {message}")

    run_or_record(check)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    *,
    is_cudnn: bool,
) -> tuple[Tensor, Tensor]:
    """Return what a fused kernel of attention does: [B, H, N, F], and logsumexp [B, H, N]."""
    if dropout:
        raise NotImplementedError("dropout within attention is not emulated")
    if bias is not None and bias.dtype != query.dtype:
        raise RuntimeError("invalid dtype for bias - should match query's dtype")
    shape = (*query.shape[:3], value.shape[3])
    order = (0, 2, 1, 3)
    if is_cudnn:  # which keeps the layout of the queries
        order = tuple(sorted(range(4), key=query.stride().__getitem__, reverse=True))
    found = torch.empty_permuted(shape, order, dtype=query.dtype, device=CUDA)
    sums = torch.empty(query.shape[:3], dtype=torch.float32, device=CUDA)
    q, k, v, b, told, told_sums = map(on_host, (query, key, value, bias, found, sums))

    def run() -> None:
        scores, values = _scores(q, k, v, b, causal, scale)
        told_sums.copy_(scores.logsumexp(-1))
        told.copy_(scores.softmax(-1) @ values)

    run_or_record(run)
    return found, sums


def _scores(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    q, k, v = (
        t.float() for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    )
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores, v


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    g, q, k, v, b = map(on_host, (grad, query, key, value, bias))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    scores, values = _scores(q, k, v, b, causal, scale)
    weights, g = scores.softmax(-1), g.float()
    grad_weights = g @ values.mT
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    of_query = grad_scores @ k.repeat_interleave(groups, 1).float() * factor
    of_keys = (grad_scores.mT @ q.float() * factor, weights.mT @ g)
    of_key, of_value = (t.unflatten(1, (-1, groups)).sum(2) for t in of_keys)
    made = ((of_query, query), (of_key, key), (of_value, value))
    grad_q, grad_k, grad_v = (_to_device(told.to(like.dtype)) for told, like in made)
    return grad_q, grad_k, grad_v


def dropout(given: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Return what is left of a tensor, and what was kept, by draws of the device's generator."""
    kept = torch.rand_like(given, dtype=torch.float32) >= (p if train is not False else 0.0)
    return given * kept / (1 - p if train is not False else 1.0), kept


class Attention:
    """One of torch's fused kernels of attention, or its backward."""

    def __init__(self, kind: str, suffix: str) -> None:
        name = f"_scaled_dot_product_{kind}_attention{suffix}"
        schema = getattr(torch.ops.aten, name).default._schema
        self.kind, self.names = kind, [argument.name for argument in schema.arguments]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        options = given.get("attn_bias"), given.get("dropout_p", 0.0)
        attended = (given["query"], given["key"], given["value"], *options)
        return *attended, given.get("is_causal", False), given.get("scale")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what torch's does: found, logsumexp, and more that its backward is given."""
        ran[f"{self.kind} attention"] += 1
        query, key, *_ = given = self._given(args, kwargs)
        seeds = (torch.empty((), dtype=torch.long) for _ in range(2))
        if self.kind == "efficient":
            return *attend(*given, is_cudnn=False), *seeds
        lengths = query.shape[2], key.shape[2]
        found = attend(*given, is_cudnn=self.kind == "cudnn")
        return *found, None, None, *lengths, *seeds, query.new_empty(0)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the gradients of queries, keys and values; of a bias there is none."""
        found = attend_backward(args[0], *self._given(args, kwargs))
        return (*found, None) if self.kind == "efficient" else found


def rms_norm_backward(
    grad: Tensor,
    given: Tensor,
    shape: list[int],
    scale: Tensor,
    weight: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a root mean square norm's input and weight (scale is 1 / rms)."""
    g, x, s, w = map(on_host, (grad, given, scale, weight))
    dims = tuple(range(x.ndim - len(shape), x.ndim))
    normal, g = x.float() * s, g.float()
    scaled = g if w is None else g * w.float()
    of_x = s * (scaled - normal * (scaled * normal).mean(dims, keepdim=True))
    of_w = (g * normal).sum(tuple(range(x.ndim - len(shape))))
    return (
        _to_device(of_x.to(x.dtype)) if wanted[0] else None,
        _to_device(of_w.to(x.dtype)) if wanted[1] else None,
    )


_OWN = {
    "copy_": copy_,
    "_assert_async": assert_async,
    "_assert_async.msg": assert_async,
    "native_dropout": dropout,
    "_fused_rms_norm_backward": rms_norm_backward,
    **{
        f"_scaled_dot_product_{kind}_attention{suffix}": getattr(Attention(kind, suffix), way)
        for kind in ("efficient", "flash", "cudnn")
        for suffix, way in (("", "forward"), ("_backward", "backward"))
    },
}
"""Operations that the CPU has not, or not so."""


def install() -> torch.library.Library:
    """Give every operation with a CUDA kernel one of ours; they are there while this lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        names = (full.split("::") for full in torch._C._dispatch_get_all_op_names())
        kernels = {name: _operation(name) for space, name in names if space == "aten"} | _OWN
        for name, kernel in kernels.items():
            if kernel is not None:
                library.impl(name, kernel, "CUDA", allow_override=True)
    return library


def _operation(name: str) -> Callable[..., Any] | None:
    """Return an operation's kernel; None for those without one, for views and what is kept."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")
    if name in _KEPT or not has_kernel:
        return None
    base, _, overload = name.partition(".")
    made = Operation(name, getattr(getattr(torch.ops.aten, base), overload or "default"))
    if any(r.alias_info is not None and not r.alias_info.is_write for r in made.returns):
        return None

    def run(*args: Any, **kwargs: Any) -> Any:
        return made(*args, **kwargs)

    return run


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
INSTALLED = install()
