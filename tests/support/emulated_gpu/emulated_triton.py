"""Triton's kernels on an emulated GPU: what torch.compile writes for it.

Each is compiled for an H200, down to machine code, and not loaded. Its source then runs in Triton's
own interpreter, on the device's memory. Of several forms of a kernel, which a GPU would time at the
first call, the first runs; none is added or tuned after its registers are known. Programs run one
after another: no race between them shows, nor a wait that is missing.
`is_interpreting = False` leaves them out, for kernels of sizes that would take hours.

Private: torch 2.11, Triton 3.6.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch._inductor.config
import triton
import triton.backends.nvidia.driver
from emulated_device import check_waiting, on_host, ran, run_or_record
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton import language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_SAME = ("exp", "exp2", "expm1", "log", "log1p", "log2", "sqrt", "tanh", "sin", "cos")
_SAME += ("floor", "ceil", "trunc", "rint", "isnan", "isinf")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
    "nearbyint": np.rint,
    "pow": np.power,
    **{name: getattr(np, name) for name in _SAME},
}
"""Of CUDA's libdevice, which the interpreter has not."""
_DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_precompile = CachingAutotuner._precompile_config
_patch_lang, _patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
_atomic_rmw = interpreter.InterpreterBuilder.create_atomic_rmw
_reduce = interpreter.ReduceOps.apply_impl
_ALL = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what helpers see, too

is_interpreting = True
machine_code: dict[str, tuple[int, int]] = {}
"""Registers of a thread, and bytes of its stack, by a kernel and its form: the most of such."""


class _Utils:
    """What Triton asks of a driver that has nothing to load."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        """Return what a kernel may take."""
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


def run(tuner: CachingAutotuner, *args: Any, stream: int, **kwargs: Any) -> None:
    """Run a kernel that inductor has written, or record that."""
    if not tuner.compile_results:
        tuner.precompile()
    is_tuned = tuner.inductor_meta.get("coordinate_descent_tuning") and tuner.launchers == []
    if len(tuner.compile_results) > 1 or is_tuned:  # on a GPU they are timed against each other
        check_waiting("a choice between forms of a kernel")
        tuner.compile_results, tuner.launchers = tuner.compile_results[:1], [None]
    config = tuner.compile_results[0].config
    given, grid = tuner._interpret_args_grid(args, config)
    ran[f"triton: {tuner.inductor_meta['kernel_name']}"] += 1
    for place, said in tuner.triton_meta["configs"][0].items():
        if ["tt.divisibility", 16] in said and isinstance(args[place[0]], torch.Tensor):
            assert args[place[0]].data_ptr() % 16 == 0, (tuner.inductor_meta, place)
    if not is_interpreting:
        return
    function, held = tuner.fn.fn, [on_host(value) for value in given]
    run_or_record(lambda: _interpret(function, held, config.kwargs, grid))


def _compiled(tuner: CachingAutotuner, config: Any) -> Any:
    """Compile a form of a kernel, and note what it takes."""
    result = _precompile(tuner, config)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.kernel.asm["cubin"])
        file.flush()
        command = [str(_DUMP), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found, told
    name = f"{tuner.inductor_meta['kernel_name']} ({config})"
    before = machine_code.get(name, (0, 0))  # others have the same name
    machine_code[name] = (
        max(before[0], int(found[1])),
        max(before[1], *map(int, found.groups()[1:])),
    )
    return result


def _interpret(
    function: Callable[..., Any],
    args: list[Any],
    sizes: dict[str, int],
    grid: tuple[int, int, int],
) -> None:
    ours = {name: _by_numpy(function) for name, function in _FUNCTIONS.items()}
    waits = dict.fromkeys(("gdc_wait", "gdc_launch_dependents"), lambda: None)
    with (
        mock.patch.multiple(libdevice, **ours),
        mock.patch.multiple(tl.extra.cuda, **waits),  # for a kernel that has ended
        np.errstate(all="ignore"),
    ):
        _interpreted(function).run(*args, grid=grid, warmup=False, **sizes)


@cache
def _interpreted(function: Callable[..., Any]) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function)


def _called(helper: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """Call what a kernel calls; Triton's own way leaves the language patched."""
    return _interpreted(helper.fn).rewrite()(*args, **kwargs)


def _by_numpy(function: Callable[..., Any]) -> Callable[..., tl.tensor]:
    def call(*args: Any) -> tl.tensor:
        tensors = [interpreter.interpreter_semantic.to_tensor(value) for value in args]
        found = function(*(tensor.handle.data for tensor in tensors))
        scalar = tl.int32 if found.dtype == bool else tensors[0].dtype
        found = found.astype(interpreter._get_np_dtype(scalar))
        is_block = tensors[0].type.is_block()
        type_ = tl.block_type(scalar, [*found.shape]) if is_block else scalar
        return tl.tensor(interpreter.TensorHandle(found, scalar), type_)

    return call


def _atomic(
    builder: Any, operation: Any, address: Any, value: Any, mask: Any, sem: Any, scope: Any
) -> Any:
    """Work on whole arrays; the interpreter reads views with strides of 0 as if they were such."""
    whole = [
        interpreter.TensorHandle(np.ascontiguousarray(one.data), one.dtype)
        for one in (address, value, mask)
    ]
    return _atomic_rmw(builder, operation, *whole, sem, scope)


def _reduced(reduction: interpreter.ReduceOps, given: tuple[tl.tensor, ...]) -> Any:
    """Reduce by numpy what inductor has functions of its own for; others element by element."""
    for function, ours in (triton_helpers.maximum, np.max), (triton_helpers.minimum, np.min):
        if reduction.combine_fn is function:
            return reduction.min_max(given[0], ours)
    return _reduce(reduction, given)


def _patch_tensor(tensor: type, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    # numpy 2.4 no longer makes a number of an array of one
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def install() -> None:
    """Have Triton's kernels compiled and interpreted."""
    torch._inductor.config.use_static_cuda_launcher = False  # it drops the source
    torch._inductor.config.compile_threads = 1  # in this process, where there is a GPU
    triton.backends.nvidia.driver.CudaUtils = _Utils
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)  # half of the time
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._patch_lang = lambda function: _patch_lang(_ALL)
    interpreter.InterpreterBuilder.create_atomic_rmw = _atomic
    interpreter.ReduceOps.apply_impl = _reduced
    JITFunction.__call__ = _called
    CachingAutotuner.run = run
    CachingAutotuner._precompile_config = _compiled
    CachingAutotuner._make_launchers = lambda tuner: None
    CachingAutotuner._dynamic_scale_rblock = lambda tuner: None


install()
