"""Run Python where torch sees an H200 that is not there.

Two things of the CUDA build of torch are replaced: the CUDA runtime (`emulated_gpu/cudart.cpp`), by
one whose memory is the host's, and the kernels of torch's operations, by torch's CPU kernels
(`emulated_operations.py`). The caching allocator, autograd, autocast, views and the choice of
kernels are torch's own; the project's kernels are compiled for the CPU, and what torch.compile
writes is interpreted (`emulated_triton.py`), with caches of its own in FOLDER.

It is slow, and says nothing about speed. Streams do at once what they are given, so that no order
of streams, and no copy that has not ended, is wrong here. Values are the CPU's, ties and sums in 16
bits as well.

Needed: a build of torch with CUDA, and g++. `python tests/support/emulated.py FOLDER -m medusa_exp
...` runs a command so; FOLDER keeps what is compiled.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
FOLDER = HERE / "emulated_gpu"
PACKAGES = Path(torch.__file__).parents[1]
HEADERS = (PACKAGES / "nvidia/cu13/include", PACKAGES / "triton/backends/nvidia/include")
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
    if not all(path.is_dir() for path in HEADERS):
        return f"there are no headers of CUDA in {HEADERS[0]}"
    return None


def build(folder: Path) -> None:
    """Compile the runtime and the driver into a folder."""
    runtime = [*("-std=c++20", "-shared", "-fPIC", "-O1"), *(f"-I{path}" for path in HEADERS)]
    runtime += [str(FOLDER / "cudart.cpp"), "-o", str(folder / "libcudart.so")]
    driver = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    for arguments, text in ((runtime, ""), ([*driver, "-o", str(folder / "libcuda.so.1")], DRIVER)):
        subprocess.run(["g++", *arguments], input=text, text=True, check=True)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that sees the GPU, built into this folder."""
    added = {
        "LD_PRELOAD": [folder / "libcudart.so"],
        "LD_LIBRARY_PATH": [folder],
        "PYTHONPATH": [FOLDER, HERE],
    }
    joined = {
        name: os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get(name)])])
        for name, paths in added.items()
    }
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    ours = {name: str(folder / place) for name, place in caches.items()}
    return {**os.environ, **joined, **ours}


def run(
    folder: Path, *arguments: str, complains: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments where there is the GPU; it has to end well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(folder) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        **options,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ("emulated GPU:" in done.stderr) == complains, done.stderr[-3000:]
    return done


if __name__ == "__main__":  # python tests/support/emulated.py FOLDER ARGUMENTS...
    place = Path(sys.argv[1])
    if not (place / "libcudart.so").exists():
        place.mkdir(parents=True, exist_ok=True)
        build(place)
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(place))
