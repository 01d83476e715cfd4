"""Run Python where torch sees an H200 that is not there.

Nothing stands between the CUDA build of torch and a GPU but libraries that can be had in another
form: the CUDA runtime, whose place `emulated_gpu/cudart.cpp` takes with memory of the host, and the
kernels of torch's operations, whose place torch's CPU kernels take (emulated_operations.py). All
else is the real thing: devices, streams, the caching allocator, autocast, captured graphs, and the
project's kernels, compiled for the CPU. It is slow, and says nothing about speed.

Needed: a build of torch with CUDA, and g++.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
FOLDER = HERE / "emulated_gpu"
DRIVER = """
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
  if (flags) *flags = 0;
  if (is_active) *is_active = 1;
  return 0;
}
"""
"""All that torch asks of a driver which is not asked through the runtime."""


def why_not() -> str | None:
    """Return why there can be no emulated GPU here; None if there can."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


def build(folder: Path) -> None:
    """Compile the runtime and the driver into a folder."""
    packages = Path(torch.__file__).parents[1]
    headers = (packages / "nvidia/cu13/include", packages / "triton/backends/nvidia/include")
    runtime = [*("-std=c++20", "-shared", "-fPIC", "-O1"), *(f"-I{path}" for path in headers)]
    runtime += [str(FOLDER / "cudart.cpp"), "-o", str(folder / "libcudart.so")]
    driver = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    for arguments, text in ((runtime, ""), ([*driver, "-o", str(folder / "libcuda.so.1")], DRIVER)):
        subprocess.run(["g++", *arguments], input=text, text=True, check=True)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that sees the GPU, built into this folder."""
    paths = [str(FOLDER), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libcudart.so"),
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
    }


if __name__ == "__main__":  # python tests/support/emulated.py FOLDER ARGUMENTS...
    place = Path(sys.argv[1])
    if not (place / "libcudart.so").exists():
        place.mkdir(parents=True, exist_ok=True)
        build(place)
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(place))
