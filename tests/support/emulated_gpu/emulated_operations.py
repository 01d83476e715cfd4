"""What an emulated GPU computes: each of torch's operations on CUDA tensors, by torch's CPU kernel.

Every operation that has a CUDA kernel is given another: one that does its work on CPU tensors over
the same bytes (emulated_device.py). Views, allocations and all that autograd, autocast and
composite operations do on the way are torch's own, for CUDA. Within a capture outputs get the sizes
that the meta device tells, and the operation is kept. Tensors of several devices do not mix.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from emulated_device import (
    check_waiting,
    empty_on_device,
    generator_of,
    held_by_graph,
    is_capturing,
    is_cuda,
    on_host,
    ran,
    recording,
    run_or_record,
    to_device,
)
from emulated_missing import MISSING
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

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
_UNDETERMINED = {
    *("histc", "put_", "median.dim", "median.dim_values", "grid_sampler_2d_backward"),
    *("cumsum", "cumsum_", "cumsum.out", "bincount", "scatter_reduce.two", "_ctc_loss_backward"),
}
"""Some of what torch refuses under use_deterministic_algorithms: what might be called here."""


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
        if self.name in _UNDETERMINED and torch.are_deterministic_algorithms_enabled():
            self._check_determinism(given)
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

    def _check_determinism(self, given: dict[str, Any]) -> None:
        """Raise what torch raises, under deterministic algorithms, of an operation without any."""
        is_determined = (
            (self.packet.__name__.startswith("cumsum") and not given["self"].is_floating_point())
            or (self.name == "bincount" and given.get("weights") is None)
            or (self.name == "scatter_reduce.two" and given["reduce"] != "prod")
        )
        if not is_determined and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(f"{self.name} does not have a deterministic implementation")

    def _compute(self, given: dict[str, Any]) -> Any:
        """Run the CPU kernel on what the device has in memory now."""
        given = tree_map(lambda value: generator_of(on_host(value)), given)
        if given.get("half_to_float"):  # these two have no CPU kernel from one dtype to the other
            given |= {"self": given["self"].float(), "half_to_float": False}
        asked = given.get("input_dtype")
        if asked == torch.float16:
            return self._run(given | {"input_dtype": torch.float32}).to(asked)
        return self._run(given)

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
        return self._returned(found, given, to_device)

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
        told = self._returned(sizes, given, empty_on_device)
        held = tree_map(held_by_graph, given)
        made = [] if is_in_place else [on_host(v) for v in tree_leaves(told) if is_cuda(v)]

        def again() -> None:
            found = self._run(tree_map(generator_of, held))
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
            self._run(tree_map(lambda v: generator_of(on_host(v)), inputs) | sizes)
        for name, target in targets.items():
            if target.shape != sizes[name].shape:
                target.resize_(sizes[name].shape)
        held, there = tree_map(held_by_graph, inputs), tree_map(on_host, targets)

        def again() -> None:
            found = outputs("cpu")
            self._run(tree_map(generator_of, held) | found)
            for name, target in there.items():
                target.copy_(found[name])

        run_or_record(again)
        told = [targets[name] for name in self.out]
        return told[0] if len(told) == 1 else tuple(told)


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


_OWN = {
    "copy_": copy_,
    "_assert_async": assert_async,
    "_assert_async.msg": assert_async,
    **MISSING,
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


INSTALLED = install()
