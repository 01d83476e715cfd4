"""The verification kernels on a GPU: are they right, and how fast.

    python benchmarks/gpu.py [--minutes 8] [--cases 60] [--out FILE]

Needs a CUDA device, CuPy (pip install -e '.[cuda]') and the test group; g++ for the comparison with
the shim, compute-sanitizer for its part. Writes one JSON file, benchmarks/results/gpu-<name>.json,
after every part anew: what time runs out for is listed there. gpu_points.py has the grid.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_points import RULES, Point, figures, floors_us, forms_of, make_inputs, points

SANITIZER_TOOLS = ("memcheck", "synccheck", "racecheck", "initcheck")
RESULTS = Path(__file__).parent / "results"
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
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, and torch sees none here.")
    from medusa_exp.decode.cuda import CupyKernels

    kernels = CupyKernels(torch.device("cuda"))
    if arguments.only_checks:
        import gpu_checks

        found = gpu_checks.check_verification(kernels, 3)
        raise SystemExit(f"mismatches: {found['mismatches']}" if found["mismatches"] else 0)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = arguments.out or RESULTS / f"gpu-{name}.json"
    Benchmark(kernels, out, arguments.minutes).run(arguments.cases)


class Benchmark:
    """The parts, one after the other, as far as time allows."""

    def __init__(self, kernels: Any, out: Path, minutes: float) -> None:
        self.kernels, self.out = kernels, out
        self._start, self._end = time.monotonic(), time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"command": sys.argv, "machine": _machine(), "left_out": []}

    def run(self, num_cases: int) -> None:
        """Run all parts; what fails is written down, and the next part follows."""
        parts: list[tuple[str, Callable[[], Any]]] = [
            ("verification", lambda: self._check(num_cases)),
            ("mask_and_commit", self._check_step),
            ("sanitizer", self._sanitize),
            ("grid", self._grid),
            ("decode_step", self._decode_step),
            ("compiled", self._compiled),
        ]
        for name, part in parts:
            begin = time.monotonic()
            try:
                self.found[name] = part()
            except Exception as error:
                self.found[name] = {"failed": f"{type(error).__name__}: {error}"}
            torch.cuda.empty_cache()
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
        import gpu_checks

        return gpu_checks.check_verification(self.kernels, num_cases)

    def _check_step(self) -> str:
        import gpu_checks

        return gpu_checks.check_step(self.kernels)

    def _sanitize(self) -> dict[str, str]:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return {"left_out": "there is no compute-sanitizer"}
        found = {}
        for name in SANITIZER_TOOLS:
            command = [tool, "--tool", name, sys.executable, __file__, "--only-checks"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=40)
                found[name] = done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr
            except subprocess.TimeoutExpired:
                found[name] = "took longer than 40 s"
        return found

    def _grid(self) -> list[dict[str, Any]]:
        from gpu_baselines import SplitWalk

        split_walk = SplitWalk()
        entries: list[dict[str, Any]] = []
        for point in points():
            if self.is_over(reserve=180):  # the decode step and torch.compile want their share
                self.found["left_out"].append(f"{point}")
                continue
            entries.append(self._measure(point, split_walk))
            self.found["grid"] = entries
            torch.cuda.empty_cache()
        self.write()
        return entries

    def _measure(self, point: Point, split_walk: Any) -> dict[str, Any]:
        from gpu_baselines import eager, options_of
        from gpu_timing import measure, num_copies

        from medusa_exp.decode.launch_plan import plan_for
        from medusa_exp.decode.verification_cupy import Verifier

        inputs = make_inputs(point, self.kernels.device)
        floors = floors_us(point, inputs.tree, inputs.accepted_B)
        cache_bytes = torch.cuda.get_device_properties(self.kernels.device).L2_cache_size
        bytes_of_one = inputs.logits_BNV.nbytes
        copies = [inputs]
        while len(copies) < num_copies(bytes_of_one, cache_bytes):
            copies.append(make_inputs(point, self.kernels.device))
        times: dict[str, dict[str, float]] = {}
        expected = eager(point, inputs)()
        wrong = []

        def add(name: str, make: Callable[[Any], Any], **how: Any) -> None:
            calls = [make(copy) for copy in copies]
            found = calls[0]()
            for field in ("path_BL", "num_accepted_B", "next_token_B"):
                if not getattr(found, field).equal(getattr(expected, field)):
                    wrong.append(f"{name} {field}")
            times[name] = measure(calls, **how)

        shape = (point.batch, point.nodes, point.vocab)
        chosen = plan_for(shape, point.itemsize, self.kernels)
        for plan in forms_of(chosen, shape, point.itemsize, self.kernels):
            verifier = Verifier(self.kernels, plan)
            add(
                f"{plan.form} {plan.splits} {plan.threads} {plan.cluster}",
                lambda copy, verifier=verifier: (
                    lambda: verifier(
                        copy.logits_BNV,
                        copy.tokens_BN,
                        copy.parents_BN,
                        **options_of(point, copy),
                    )
                ),
            )
        few = {"repeats": 3, "at_least": 5}
        add("a", lambda copy: eager(point, copy), **few)
        if point.rule != "typical":
            add("c", lambda copy: split_walk(point, copy), **few)
        return {
            **figures(point, floors, times),
            "chosen_form": f"{chosen.form} {chosen.splits} {chosen.threads} {chosen.cluster}",
            "differs_from_a": wrong,
        }

    def _compiled(self) -> list[dict[str, Any]]:
        """Measure baseline b, whose compilation takes long, at some points of the grid."""
        import torch._dynamo
        from gpu_baselines import compiled
        from gpu_timing import measure

        torch._dynamo.config.recompile_limit = 64  # beyond it, calls would silently be eager
        ours = {
            (entry["rule"], entry["batch"], entry["vocab"], entry["nodes"]): entry
            for entry in self.found.get("grid", [])
            if "best_form" in entry
        }
        entries = []
        for rule, batch in itertools.product(RULES, COMPILED_BATCHES):
            point = Point(rule, batch, 128256, 64)
            if self.is_over(reserve=20):
                self.found["left_out"].append(f"torch.compile: {point}")
                continue
            call = compiled(point, make_inputs(point, self.kernels.device))
            times = measure([call], repeats=3, at_least=5, with_graph=False)
            entry = {**asdict(point), "times_us": {"b": times}}
            if found := ours.get((rule, batch, 128256, 64)):
                time_us = found["times_us"][found["best_form"]]["graph_warm"]
                entry["times_as_fast_as_b_warm"] = times["eager_warm"] / time_us
            entries.append(entry)
        return entries

    def _decode_step(self) -> list[dict[str, Any]]:
        from gpu_step import measure_steps

        return measure_steps(self.kernels, (1, 8), self.is_over)


def _machine() -> dict[str, Any]:
    from measuring import machine

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
