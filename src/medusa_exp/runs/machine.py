"""What a run runs on: versions of packages, the checkout, the device, and memory used so far."""

import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_exp.tracking.redaction import shareable_text

if TYPE_CHECKING:
    import torch


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def checkout() -> tuple[dict[str, Any], str]:
    """Return commit, remote and whether anything is uncommitted, of the checkout that this package
    runs from; and the diff of what is. The commit is None where there is no checkout."""
    # An installed package may lie inside somebody else's checkout: only a tracked file is ours.
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", __file__) else None
    if commit is None:
        return {"commit": None, "dirty": False}, ""
    remote = (_git("remote", "get-url", "origin") or "").strip()
    diff = _git("diff", "HEAD") or ""
    known = {"remote": shareable_text(remote)} if remote else {}
    return {"commit": commit.strip(), "dirty": bool(diff), **known}, diff


def _git(*arguments: str) -> str | None:
    call = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's and how many threads torch uses of it.

    Args:
        device: as in the config: auto, cpu or cuda.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    number = torch.get_num_threads()
    return f"cpu: {cpu_name()}, {number} thread{'' if number == 1 else 's'}"


def cpu_name() -> str:
    """Return what the processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_bytes(device: "torch.device | None" = None) -> int:
    """Return the most memory that this process has had of a GPU, if it is one, or else of the
    machine."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
