"""Everything that needs a GPU, in one call: the tests, the kernels' checks, and how fast all is.

    python benchmarks/gpu/run.py [--minutes 8] [--cases 60] [--out FILE]

Needs a CUDA device, CuPy (pip install -e '.[cuda]') and the test group; g++ for the comparison with
the shim, compute-sanitizer for its part. Writes one JSON file, benchmarks/results/gpu-<name>.json,
after every part anew: what time runs out for is listed there. points.py has the grid.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

import kernel_device
from gpu import decode_step, training, verification
from gpu.points import RULES, Point, points
from measuring import machine
from rivals.verification import SplitWalk

from medusa_exp.decode.cuda.runtime import CupyKernels

SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_SECONDS = 45
TEST_SECONDS = 300
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMPILED_BATCHES = (8, 64, 1)
"""For one compilation serves all batches but 1."""


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after this")
    parser.add_argument("--cases", type=int, default=60, help="made-up cases of each rule")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--only-checks", action="store_true", help="a small case, for a sanitizer")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu/run.py needs a CUDA device, and torch sees none here.")
    kernels = CupyKernels(torch.device("cuda"))
    if arguments.only_checks:
        found = kernel_device.compare_small(kernels)
        raise SystemExit(f"mismatches: {found}" if found else 0)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = arguments.out or RESULTS / f"gpu-{name}.json"
    Benchmark(kernels, out, arguments.minutes).run(arguments.cases)


class Benchmark:
    """The parts, one after the other, as far as time allows."""

    def __init__(self, kernels: Any, out: Path, minutes: float) -> None:
        self.kernels, self.out = kernels, out
        self._start, self._end = time.monotonic(), time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"command": sys.argv, "left_out": []}

    def run(self, num_cases: int) -> None:
        """Run all parts; what fails is written down, and the next part follows."""
        parts: list[tuple[str, Callable[[], Any]]] = [
            ("machine", _machine),
            ("verification", lambda: self._check(num_cases)),
            ("mask_and_commit", self._check_step),
            ("tests", self._test),
            ("grid", self._grid),
            ("decode_step", self._decode_step),
            ("training", self._training),
            ("sanitizer", self._sanitize),
            ("compiled", self._compiled),
        ]
        for name, part in parts:
            begin = time.monotonic()
            try:
                self.found[name] = part()
            except Exception as error:
                self.found[name] = {"failed": f"{type(error).__name__}: {error}"}
            release()
            self.found.setdefault("seconds", {})[name] = round(time.monotonic() - begin, 1)
            self.write()
            print(f"{name}: {self.found['seconds'][name]} s", flush=True)

    def write(self) -> None:
        """Write what was found so far."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")

    def is_over(self, reserve: float = 0.0) -> bool:
        """Say whether less than `reserve` seconds are left."""
        return time.monotonic() > self._end - reserve

    def _check(self, num_cases: int) -> dict[str, Any]:
        return kernel_device.compare_verification(self.kernels, num_cases)

    def _check_step(self) -> str:
        return kernel_device.compare_step(self.kernels)

    def _test(self) -> dict[str, Any]:
        """Run `pytest -m gpu`; return its exit status and its last lines."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
        )
        return {"exit_status": done.returncode, "report": done.stdout.splitlines()[-40:]}

    def _sanitize(self) -> dict[str, str]:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return {"left_out": "there is no compute-sanitizer"}
        found = {}
        for name in SANITIZER_TOOLS:
            if self.is_over(reserve=SANITIZER_SECONDS):
                found[name] = "no time left"
                continue
            command = [tool, "--tool", name, sys.executable, __file__, "--only-checks"]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=SANITIZER_SECONDS
                )
                lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
                found[name] = " | ".join([f"exit status {done.returncode}", *lines[-3:]])
            except subprocess.TimeoutExpired:
                found[name] = f"took longer than {SANITIZER_SECONDS} s"
        return found

    def _grid(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        self.found["grid"] = entries
        split_walk = self._split_walk()
        cache_bytes = torch.cuda.get_device_properties(self.kernels.device).L2_cache_size
        for point in points():
            if self.is_over(reserve=280):  # what comes after wants its share
                self.found["left_out"].append(f"{point}")
                continue
            try:
                entries.append(
                    verification.measure_point(self.kernels, point, cache_bytes, split_walk)
                )
            except Exception as error:
                entries.append({**asdict(point), "failed": verification.told(error)})
            self.write()
            release()
        return entries

    def _split_walk(self) -> Any:
        try:
            return SplitWalk()
        except Exception as error:
            self.found["left_out"].append(f"rival split: {verification.told(error)}")
            return None

    def _compiled(self) -> list[dict[str, Any]]:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64  # beyond it, calls would silently be eager
        grid = self.found["grid"] if isinstance(self.found.get("grid"), list) else []
        entries: list[dict[str, Any]] = []
        for rule, batch in itertools.product(RULES, COMPILED_BATCHES):
            point = Point(rule, batch, 128256, 64)
            if self.is_over(reserve=60 if batch in (8, 1) else 20):  # these two compile anew
                self.found["left_out"].append(f"torch.compile: {point}")
                continue
            entries.append(verification.measure_compiled(self.kernels, point, grid))
            release()
        return entries

    def _decode_step(self) -> list[dict[str, Any]]:
        backbone = decode_step.random_llama(self.kernels.device)
        return decode_step.measure_steps(self.kernels, backbone, (1, 8), self.is_over)

    def _training(self) -> list[dict[str, Any]]:
        backbone = decode_step.random_llama(self.kernels.device)
        return training.measure_training(backbone, self.is_over)


def release() -> None:
    """Give memory back; after a fault on the device even that fails, and nobody is to stop."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def _machine() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    tool = shutil.which("nvidia-smi")
    card = "no nvidia-smi"
    if tool is not None:
        command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    import cupy

    properties = torch.cuda.get_device_properties(0)
    return {
        **machine(),
        "gpu": properties.name,
        "gpu_query": f"{query}: {card}",
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cupy": cupy.__version__,
    }


if __name__ == "__main__":
    main()
