"""The ahead-of-time CUDA build; all else about the build is in pyproject.toml.

With MEDUSA_EXP_CUDA_ARCHS="80;90" set, nvcc compiles every kernel for these devices, into files
that lie beside the sources in the wheel; prebuilt.json has the hashes of their text. Without it
no compiler is needed, and the kernels are compiled at first use.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VARIABLE = "MEDUSA_EXP_CUDA_ARCHS"


def kernel_source() -> ModuleType:
    """Return src/medusa_exp/decode/cuda/source.py without the package, which needs torch."""
    path = ROOT / "src" / "medusa_exp" / "decode" / "cuda" / "source.py"
    spec = importlib.util.spec_from_file_location("kernel_source", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archs_of(text: str) -> list[int]:
    """Return the compute capabilities that "80;90" names."""
    words = [word for word in text.split(";") if word]
    if not words or not all(word.isdigit() and int(word) >= 70 for word in words):
        raise SystemExit(f'{VARIABLE}={text} must name compute capabilities, such as "80;90".')
    return [int(word) for word in words]


def compile_kernels(archs: list[int], out: Path) -> None:
    """Write every kernel's machine code, and prebuilt.json."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit(f"{VARIABLE} is set, but there is no nvcc: install CUDA, or unset it.")
    ours = kernel_source()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]

    def compile_one(file: str, defines: tuple[str, ...]) -> tuple[str, dict[str, object]]:
        source = ours.source_of(file, ROOT / "kernels" / "cuda")
        name = ours.prebuilt_name(file, defines)
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder, file)
            text.write_text(source, "utf-8")
            command = [nvcc, "-fatbin", "-std=c++17", "-ftz=true", *targets]
            command += [*(f"-D{word}" for word in defines), str(text), "-o", str(out / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{file} does not compile:\n{done.stderr}")
        return name, {"sha256": ours.hash_of(source), "archs": archs}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        record = dict(pool.map(lambda module: compile_one(*module), ours.MODULES))
    (out / "prebuilt.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


class BuildKernels(build_py):
    """build_py, and then the kernels if they are asked for."""

    def run(self) -> None:
        super().run()
        out = Path(self.build_lib, "medusa_exp", "kernels")
        for left in [*out.glob("*.fatbin"), *out.glob("prebuilt.json")]:
            left.unlink()  # by an earlier build in the same folder
        text = os.environ.get(VARIABLE)
        if not text:
            return
        if self.editable_mode:
            raise SystemExit(f"{VARIABLE} is for wheels: unset it for an editable install.")
        compile_kernels(archs_of(text), out)


setup(cmdclass={"build_py": BuildKernels})
