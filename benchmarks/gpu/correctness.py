"""Is what a GPU says right? Kernels, captured and compiled steps, and training twice.

Captured and compiled steps are compared with eager ones in float32, on tiny models.
"""

import hashlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu.models import Scale
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slots import Request
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import Tree

MODELS = ("llama", "qwen3", "mistral", "gemma2", "gpt_neox")
TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 3)])
RULES = {
    "sampling": AcceptanceRule("sampling", temperature=2.0),
    "sampling, filtered": AcceptanceRule("sampling", temperature=2.0, top_k=12, top_p=0.9),
    "drawn drafts": AcceptanceRule("sampling", draft="sampled"),
    "drawn drafts, filtered": AcceptanceRule("sampling", top_k=12, top_p=0.9, draft="sampled"),
    "typical": AcceptanceRule("typical"),
}
NUM_CASES = 20
"""Drawn cases of each rule by which the kernels are judged."""
RUN_SECONDS = 120


def kernels_of(scale: Scale) -> Kernels:
    """Return the CUDA kernels; without a GPU the same source, compiled by g++ for the CPU."""
    if scale.device.type == "cpu":
        from kernel_shim import GXX, ShimKernels

        if GXX is None:
            raise RuntimeError("a rehearsal of the kernels needs g++")
        return ShimKernels(Path(tempfile.mkdtemp()))
    from medusa_exp.decode.cuda.runtime import CupyKernels

    return CupyKernels(scale.device)


def check_kernels(scale: Scale) -> dict[str, Any]:
    """Compare the kernels with the specification, and with the CPU's where there is g++."""
    import kernel_device

    kernels = kernels_of(scale)
    if scale.is_rehearsal:
        found = {"mismatches": kernel_device.compare_small(kernels)}
    else:
        found = kernel_device.compare_verification(kernels, NUM_CASES)
    return {**found, "mask_and_commit": kernel_device.compare_step(kernels)}


def check_steps(scale: Scale, is_over: Callable[[], bool]) -> Iterator[tuple[str, Any]]:
    """Yield for each model which captured and compiled steps do not say what eager ones do.

    For the first one also under which rules.
    """
    models = MODELS[:1] if scale.is_rehearsal else MODELS
    for name in models:
        if is_over():
            yield "left_out", f"from {name} on"
            return
        backbone = Backbone(build_model(name).to(scale.device))
        yield name, ways_that_differ(backbone, scale)
        if name == models[0]:
            yield f"{name}, rules", rules_that_differ(backbone)


def ways_that_differ(backbone: Backbone, scale: Scale) -> list[str]:
    """Return which ways of decoding do not say what eager steps say; none is as it should be."""
    rng = random.Random(0)
    heads = build_heads(backbone, num_heads=3).to(backbone.device)
    eager = Decoder(backbone, heads, TREE, cuda_graph=False)
    captured = Decoder(backbone, heads, TREE, cuda_graph=True)
    compiled = Decoder(backbone, heads, TREE, cuda_graph=True)
    compiled.layers = CompiledLayers(backbone, scale.backend)
    differ = []
    for count in (1, 3):
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(5 + 9 * n)] for n in range(count)]
        limits = Limits(40, {7})
        expected = [a.tokens for a in eager.decode_plain(prompts, limits)]
        ways = {
            "eager tree": eager.decode,
            "captured": captured.decode,
            "captured plain": captured.decode_plain,
            "compiled": compiled.decode,
            "compiled plain": compiled.decode_plain,
        }
        for told, way in ways.items():
            for _ in range(2):  # captured, and replayed
                if [a.tokens for a in way(prompts, limits)] != expected:
                    differ.append(f"{told}, B={count}")
    if compiled.layers.is_refused:
        differ.append("compiled: its layers were not")
    return differ


def rules_that_differ(backbone: Backbone) -> list[str]:
    """Return under which rules captured steps with kernels do not draw what eager ones in torch do.

    Each request has numbers of its own to draw by, whatever the steps are.
    """
    rng, differ = random.Random(1), []
    heads = build_heads(backbone, num_heads=3).to(backbone.device)
    requests = [
        Request([rng.randrange(VOCAB_SIZE)] * 5, Limits(30, {7}), seed=(0, number), tag=number)
        for number in range(6)
    ]
    for told, rule in RULES.items():
        ways = (replace(rule, verifier="torch"), False), (rule, True)
        found = [
            {
                done.request.tag: done.response.tokens
                for done in Decoder(backbone, heads, TREE, used, cuda_graph=is_captured)
                .slots(2, 128)
                .decode(iter(requests))
            }
            for used, is_captured in ways
        ]
        if found[0] != found[1]:
            differ.append(told)
    return differ


def check_training(scale: Scale) -> dict[str, Any]:
    """Train the smoke run's heads twice, at a time; return whether they are equal byte for byte."""
    with tempfile.TemporaryDirectory() as work:
        places = [Path(work) / name for name in ("one", "other")]
        with ThreadPoolExecutor() as pool:
            found = [*pool.map(partial(_heads_of_a_run, scale), places)]
    return {"sha256": found[0], "equal": found[0] == found[1]}


def _heads_of_a_run(scale: Scale, place: Path) -> str:
    out = place / "run"
    command = [sys.executable, "-m", "medusa_exp", "+experiment=smoke", "logger=none"]
    settings = ["stages=[pretrain,train]", f"device={scale.device.type}", f"run_dir={out}"]
    done = subprocess.run(
        [*command, *settings, f"cache_dir={place / 'cache'}"],
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    files = sorted((out / "heads").glob("*.safetensors"))
    assert files, "the run left no heads"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
