"""Everything that needs a GPU, in one call: is it right, and how fast is the product on it?

    python benchmarks/gpu/run.py               at most eight minutes, then one table
    python benchmarks/gpu/run.py --rehearse    the same, tiny, without a GPU too: does it run?
    python benchmarks/gpu/run.py --grid        verification at 144 points, every launch, rivals
    python benchmarks/gpu/run.py --forms       how a step could be faster: layers, attention
    python benchmarks/gpu/run.py --sanitize    the kernels under compute-sanitizer's four tools

Needs what docs/guide/gpu.md says. Each part runs in a process of its own, so that none is lost by
another's fault, and writes what it finds as it finds it. One JSON file:
benchmarks/results/gpu-<name>.json (forms-, grid- or sanitize-<name>.json). bars.py has the table's
rows.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from gpu.bars import shown, table
from gpu.models import Scale, full, rehearsal

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = {
    "machine": 15,
    "correctness": 80,
    "steps_7B": 65,
    "steps_8B": 60,
    "regeneration": 55,
    "speedup": 25,
    "training_7B": 25,
    "training_8B": 30,
    "kernels": 15,
    "from_scratch": 95,
    "generate": 15,
}
"""Parts, and the seconds that are kept for each: together eight minutes. The first ones matter
most. After its own seconds a part begins nothing more; it is ended where it would take those of
the parts behind it, for which it has what the parts before it have left."""
FORMS = {"attention": 60, "forms_7B": 190, "forms_8B": 200}
"""Parts of --forms, and the seconds of each."""
SECONDS = PARTS | FORMS
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
MEASURED = re.compile(r"[^a-z0-9]+")

IsOver = Callable[[], bool]


def main() -> None:
    """Measure, write what was found, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.8, help="of all parts together")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything tiny, on a GPU or a CPU"
    )
    parser.add_argument("--grid", action="store_true", help="the whole grid of verification alone")
    parser.add_argument("--forms", action="store_true", help="forms of a captured step alone")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what one process does
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu/run.py needs a CUDA device, and torch sees none here. --rehearse runs "
            "everything tiny, on the CPU."
        )
    scale = rehearsal() if given.rehearse else full()
    if given.small_case:
        raise SystemExit(small_case())
    if given.part:
        write_part(given.part, scale, given.seconds, given.out)
        return
    extra = [name for name in ("grid", "sanitize") if getattr(given, name)]
    extra += FORMS if given.forms else []
    kind = "forms" if given.forms else "-".join(extra) or "gpu"
    out = given.out or default_place(given.rehearse, kind)
    found = Benchmark(out, given.minutes, is_rehearsal=given.rehearse).run(extra or given.parts)
    if not extra:
        print(shown(found["table"]))
    if given.rehearse:
        print("\nA rehearsal: its figures say nothing, but that the script runs.")
    print(f"\n{out}")


def default_place(is_rehearsal: bool, kind: str) -> Path:
    """Return where the JSON goes: what a rehearsal found is no result."""
    if is_rehearsal:
        return Path(tempfile.gettempdir()) / f"{kind}-rehearsal.json"
    name = MEASURED.sub("-", torch.cuda.get_device_name().lower()).strip("-")
    return RESULTS / f"{kind}-{name}.json"


class Benchmark:
    """The parts, one after the other, as far as time allows."""

    def __init__(self, out: Path, minutes: float, *, is_rehearsal: bool) -> None:
        self.out, self.is_rehearsal = out, is_rehearsal
        self._end = time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"command": sys.argv, "seconds": {}}

    def run(self, parts: list[str]) -> dict[str, Any]:
        """Run parts in processes of their own; what fails is written down, and the next follows."""
        for number, name in enumerate(parts, 1):
            begin = time.monotonic()
            left = self._end - begin
            seconds = min(SECONDS.get(name, left), left)
            if seconds < 5:
                self.found[name] = {"left_out": "no time left"}
                continue
            kept = sum(SECONDS.get(later, 0) for later in parts[number:])
            self.found[name] = self.run_part(name, seconds, max(seconds, left - kept))
            self.found["seconds"][name] = round(time.monotonic() - begin, 1)
            self.write()
            fault = self.found[name].get("failed", "")
            print(f"{name}: {self.found['seconds'][name]} s {fault[-200:]}", flush=True)
        self.write()
        return self.found

    def run_part(self, name: str, seconds: float, most: float) -> dict[str, Any]:
        """Run one part in a process of its own; return what it wrote, and how it failed.

        After `seconds` it begins nothing more; after `most` it is ended, with all that it started.
        """
        command = [sys.executable, __file__, "--part", name, "--seconds", str(seconds)]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.json"
            command += ["--out", str(file)] + ["--rehearse"] * self.is_rehearsal
            fault = fault_of(command, Path(folder) / "stderr", most)
            found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        if fault is not None:
            found.setdefault("failed", fault)
        return found

    def write(self) -> None:
        """Write what was found so far."""
        self.found["table"] = table(self.found)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")


def fault_of(command: list[str], log: Path, most: float) -> str | None:
    """Run a command in a session of its own, and end that after `most` seconds; None if it is well.

    What it says goes to a file: a pipe would be held open by whatever it has started.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(most)
        except subprocess.TimeoutExpired:
            return f"ended after {most:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")[-2000:] if status else None


def write_part(name: str, scale: Scale, seconds: float, out: Path) -> None:
    """Run a part here, and write each figure when it comes; a fault is written, then raised."""
    end, found = time.monotonic() + seconds, {}
    try:
        for key, figure in figures_of(name, scale, lambda: time.monotonic() > end):
            found[key] = figure
            out.write_text(json.dumps(found), "utf-8")
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
        out.write_text(json.dumps(found), "utf-8")
        raise


def figures_of(name: str, scale: Scale, is_over: IsOver) -> Iterator[tuple[str, Any]]:
    """Yield what a part finds."""
    from gpu import correctness, decode_step, drafts, forms, training, verification

    if name == "machine":
        yield from _machine(scale)
    elif name == "correctness":
        yield from _correctness(scale, is_over)
    elif name.startswith("steps_"):
        yield from decode_step.measure_steps(name.removeprefix("steps_"), scale, is_over)
    elif name == "generate":
        yield from decode_step.measure_generate("7B", scale, is_over)
    elif name == "speedup":
        yield from decode_step.measure_speedup("7B", scale, is_over)
    elif name == "regeneration":
        yield from decode_step.measure_regeneration("8B", scale, is_over)
    elif name == "training_7B":
        yield from training.measure_training("7B", ("medusa",), scale, is_over)
    elif name == "training_8B":
        kinds = ("medusa_tied", "medusa")
        yield from training.measure_training("8B", kinds, scale, is_over)
    elif name == "kernels":
        some = verification.FEW if scale.is_rehearsal else verification.SOME
        kernels = correctness.kernels_of(scale)
        yield from verification.measure_some(kernels, is_over, some)
        yield from drafts.measure_topk(kernels, is_over, some)
        yield from drafts.measure_draws(kernels, is_over, some)
        yield from drafts.measure_filters(kernels, is_over, some)
    elif name == "grid":
        yield from verification.measure_grid(correctness.kernels_of(scale), is_over)
    elif name == "attention":
        yield from forms.measure_first_calls(scale, is_over)
        yield from forms.measure_attention(scale, is_over)
    elif name.startswith("forms_"):
        yield from forms.measure_forms(name.removeprefix("forms_"), scale, is_over)
    elif name == "sanitize":
        yield from _sanitized(is_over)
    elif name == "from_scratch":
        yield from _from_scratch(scale)


def _correctness(scale: Scale, is_over: IsOver) -> Iterator[tuple[str, Any]]:
    """Yield the three checks; one that fails costs no other."""
    from gpu import correctness

    checks: dict[str, Callable[[], Any]] = {
        "kernels": lambda: correctness.check_kernels(scale),
        "training": lambda: correctness.check_training(scale),
    }
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:
            yield name, {"failed": f"{type(error).__name__}: {error}"[-2000:]}
    steps: dict[str, Any] = {}
    try:
        for name, differ in correctness.check_steps(scale, is_over):
            steps[name] = differ
            yield "steps", steps
    except Exception as error:
        yield "steps", {**steps, "failed": f"{type(error).__name__}: {error}"[-2000:]}


def _from_scratch(scale: Scale) -> Iterator[tuple[str, Any]]:
    """Run that experiment on the device, all of it; a rehearsal runs the smoke experiment."""
    experiment = "smoke" if scale.is_rehearsal else "from_scratch"
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "run"
        settings = [f"run_dir={out}", f"cache_dir={work}/cache", "logger=csv"]
        if importlib.util.find_spec("vl_convert") is None:
            settings.append("stages=[pretrain,regenerate,train,calibrate,evaluate]")
            yield "left_out", "stage report: there is no vl-convert-python"
        command = [sys.executable, "-m", "medusa_exp", f"+experiment={experiment}", *settings]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, f"device={scale.device.type}"], capture_output=True, text=True, check=False
        )
        yield "seconds", time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        metrics = json.loads((out / "metrics.json").read_text())
        yield "stage_seconds", _seconds_of_stages(out)
    yield "metrics", {k: v for k, v in metrics.items() if k.startswith(("eval/", "calibrate/"))}
    predicted = metrics["calibrate/predicted_speedup"]
    yield "measured_over_predicted", metrics["eval/speedup"] / predicted


def _seconds_of_stages(out: Path) -> Any:
    record = json.loads((out / "run.json").read_text())
    return {name: stage.get("seconds") for name, stage in record.get("stages", {}).items()}


def _machine(scale: Scale) -> Iterator[tuple[str, Any]]:
    from measuring import machine

    yield from machine().items()
    if scale.device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(0)
    yield "gpu", properties.name
    yield "memory_gigabytes", properties.total_memory / 1e9
    yield "cuda", torch.version.cuda
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    if tool := shutil.which("nvidia-smi"):
        command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield "gpu_query", f"{query}: {done.stdout.strip()}"
    yield "copy_terabytes_per_second", _copy_rate(scale.device) / 1e12


def _copy_rate(device: torch.device) -> float:
    """Return bytes read and written a second by a copy within the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / min(seconds)


def small_case() -> str | int:
    """Judge a case of each rule by each launch; return the exit status."""
    import kernel_device

    from medusa_exp.decode.cuda.runtime import CupyKernels

    mismatches = kernel_device.compare_small(CupyKernels(torch.device("cuda")))
    return f"mismatches: {mismatches}" if mismatches else 0


def _sanitized(is_over: IsOver) -> Iterator[tuple[str, str]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield "left_out", "there is no compute-sanitizer"
        return
    for name in SANITIZER_TOOLS:
        if is_over():
            yield name, "no time left"
            continue
        command = [tool, "--tool", name, sys.executable, __file__, "--small-case"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
        yield name, " | ".join([f"exit status {done.returncode}", *lines[-3:]])


if __name__ == "__main__":
    main()
