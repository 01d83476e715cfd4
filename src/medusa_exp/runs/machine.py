"""What this machine is: its processor, the cores that are ours, and the arithmetic that is fast.

Processors differ in what they have arithmetic for. Where one has none for bfloat16, torch takes
each product apart, and a model in bfloat16 runs several times slower than in float32: most
laptops, and servers of some years ago. torch is imported where it is used: the command line
answers without it.
"""

import getpass
import logging
import os
import platform
import re
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_exp.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that are multiplied for `matrix_rate`."""
_SMALL = 256
"""Rows and columns where nothing but time tells whether there is arithmetic."""
_HAS_BF16 = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_1", "avx10_2")
_HAS_FP16 = ("avx512_fp16", "amx_fp16", "avx10_1", "avx10_2")
"""What torch calls the instructions for the half types of x86 processors."""


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: by its affinity, and by its container's quota.

    `root` is where /proc and /sys are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    number = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([number, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Return the cores that each control group this process is in may use, where it says so."""
    with suppress(OSError, ValueError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        groups = [line.split(":", 2) for line in lines]
        return [quota for _, kinds, name in groups for quota in _quotas_of(root, kinds, name)]
    return []


def _quotas_of(root: Path, kinds: str, name: str) -> list[float]:
    """Return the quotas of a group, and of those around it, in either version of their files."""
    mount = root / "sys/fs/cgroup"
    if kinds:  # version 1: a tree for some kinds of limits, such as cpu,cpuacct
        if "cpu" not in kinds.split(","):
            return []
        mount = mount / ("cpu" if (mount / "cpu").is_dir() else kinds)
    place = mount / name.strip("/").replace("../", "")
    found = []
    # In a container the name may be the host's, of which nothing is here but the mount itself.
    for group in {place, *place.parents, mount}:
        if not group.is_relative_to(mount):
            continue
        with suppress(OSError, ValueError):
            if kinds:
                words = [(group / f"cpu.cfs_{word}_us").read_text() for word in ("quota", "period")]
            else:
                words = (group / "cpu.max").read_text().split()
            quota, period = (float(word) for word in words)  # "max" is no number
            if quota > 0:
                found.append(quota / period)
    return found


def ensure_home() -> str | None:
    """Name a home directory where there is none: many libraries ask for one as they are imported.

    So it is in containers that are started with a bare user id.

    Returns:
        What to tell the user, if it was so.
    """
    try:
        Path.home()
        getpass.getuser()
        return None
    except (RuntimeError, KeyError, OSError, ImportError):  # by versions of Python
        number = os.getuid() if hasattr(os, "getuid") else 0
        os.environ.setdefault("USER", str(number))
        if "HOME" in os.environ:
            return None
        home = Path(tempfile.gettempdir()) / f"medusa_exp-home-{number}"
        home.mkdir(mode=0o700, exist_ok=True)
        if home.stat().st_uid != number:  # another user has been quicker
            home = Path(tempfile.mkdtemp(prefix="medusa_exp-home-"))
        os.environ["HOME"] = str(home)
        return f"this user has no home directory: HOME={home} is set for this command"


def limit_threads() -> int:
    """Have torch start no more threads than there are cores to use; return how many.

    torch counts the host's cores, whatever a container may use of them, and threads without a core
    hold up the others. Who sets OMP_NUM_THREADS has chosen, unless it is 0 or no number: torch
    then counts as if it were not set.
    """
    import torch

    has_chosen = re.match(r"\s*\+?0*[1-9]", os.environ.get("OMP_NUM_THREADS", ""))
    if not has_chosen and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())
    return torch.get_num_threads()


def pick_device(device: str) -> "torch.device":
    """Return the device for `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UserError: cuda or mps was asked for and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here. Use device=auto or cpu.")
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps, but torch sees no Apple GPU here. Use device=auto or cpu.")
        _say_untried()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@cache
def _say_untried() -> None:
    log.warning(
        "device=mps has not been tried by those who wrote this. Everything is calculated in "
        "float32; compare eval/identical_fraction with 1 before you believe the rest, and take "
        "device=cpu where something fails"
    )


@cache
def has_arithmetic(device: "torch.device", dtype: "torch.dtype") -> bool:
    """Say whether a device multiplies matrices of this type itself, and not by float32's means.

    Of a CPU it is asked what torch knows of it; where torch knows nothing, as on Apple silicon, two
    small products are timed.
    """
    import torch

    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":  # nothing is known of it
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        is_known = bool(getattr(torch.ops.mkldnn, name)())  # private: torch 2.13
    except (AttributeError, RuntimeError):  # torch was built without oneDNN
        kinds = (dtype, torch.float32)
        rate, usual = (matrix_rate(device, kind, 0.05, size=_SMALL) or 0.0 for kind in kinds)
        return rate > usual  # by far or not at all
    # oneDNN also means processors on which it takes bfloat16 apart, at a third of float32's rate.
    words = _HAS_BF16 if dtype == torch.bfloat16 else _HAS_FP16
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") == "x86_64":
        return is_known and any(capabilities.get(word) for word in words)
    return is_known


def matrix_rate(
    device: "torch.device", dtype: "torch.dtype", seconds: float, size: int | None = None
) -> float | None:
    """Return the floating-point operations a second of a large matrix product.

    None where there is no memory for it. Draws no random number that anybody else would get.
    """
    import torch

    size = size or _SIZE.get(device.type, _SIZE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    try:
        a, b = torch.randn(2, size, size, generator=generator, device=device).to(dtype)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or best == float("inf"):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None
    return 2 * size**3 / best


def device_name(device: str) -> str:
    """Return the GPU's name; without one, or for `cpu`, the processor's and torch's threads."""
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    if device == "mps":
        return f"mps: {cpu_name()}"
    number = torch.get_num_threads()
    return f"cpu: {cpu_name()}, {number} thread{'' if number == 1 else 's'}"


def log_machine(device: str) -> None:
    """Say on what a run will calculate; see to it that torch starts no threads in vain."""
    limit_threads()
    name = device_name(device)
    log.info("%s", f"{name}: {describe_cpu()}" if name.startswith("cpu") else name)


@cache
def describe_cpu() -> str:
    """Say what this CPU does a second, and what follows from it. Measures less than 0.1 s, once."""
    import torch

    cpu = torch.device("cpu")
    has_bf16 = has_arithmetic(cpu, torch.bfloat16)
    dtypes = [torch.float32, *([torch.bfloat16] if has_bf16 else [])]
    rates = {dtype: matrix_rate(cpu, dtype, 0.03, size=384) or 0.0 for dtype in dtypes}
    said = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {rate / 1e9:.0f}" for dtype, rate in rates.items()
    )
    follows = "" if has_bf16 else "; it has no bfloat16 arithmetic, so that auto is float32"
    return f"matrix products at {said} GFLOP/s{follows}"


@cache
def cpu_name() -> str:
    """Return what the processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done all that it was given, so that a clock can be read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: "torch.device | None" = None) -> int:
    """Return the most memory that this process has had of a GPU, if it is one, or else of the
    machine: where the system does not say, what it has now."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows, whose word for it psutil knows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def gpu_memory(device: "torch.device") -> int | None:
    """Return the bytes of a GPU's memory, used ones too; None of a CPU."""
    import torch

    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def available_memory() -> int:
    """Return the bytes of memory that processes may still take."""
    import psutil

    return int(psutil.virtual_memory().available)
