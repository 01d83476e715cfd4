"""The parts of benchmarks/gpu that need no GPU."""

import dataclasses
import json
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import kernel_device
import pytest
import torch
from gpu import bars, correctness, decode_step, drafts, models, run, training, verification
from gpu.points import KERNELS, Point, configs_of, figures, floors_us, make_inputs, points, tree_of
from gpu.timing import num_copies
from kernel_shim import GXX, ShimKernels
from rivals.verification import options_of
from tiny_models import build_model

from medusa_exp.cli import STAGES
from medusa_exp.decode import step
from medusa_exp.decode.cuda.launch import LaunchConfig, launch_config
from medusa_exp.decode.verify import verify
from medusa_exp.model import Backbone, build_heads
from medusa_exp.train.throughput import Operations

SCALE = dataclasses.replace(models.rehearsal(), device=torch.device("cpu"))
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def test_the_grid_has_every_combination_once():
    grid = points()
    assert len(grid) == len(set(grid)) == 6 * 3 * 2 * 4
    assert grid[0] == Point("greedy", 1, 32000, 64)


def test_floors_of_the_fact_sheet():
    """64 nodes over 128256 tokens in bfloat16, B = 1: 5.5 us for all rows, 2.0 for 22 + 1."""
    tree = tree_of(64)
    assert len(tree) == 64 and len(set(tree.parents) - {-1}) == 22
    floors = floors_us(Point("sampling", 1, 128256, 64), tree, [2])
    assert floors["all"] == pytest.approx(5.47, abs=0.01)
    assert floors["needed"] == pytest.approx(1.97, abs=0.01)
    assert floors["path"] == pytest.approx(3 * 5.47 / 64, abs=0.01)


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_accept_what_they_promise(kernel):
    point = Point(kernel, 5, 3000, 16)
    inputs = make_inputs(point, torch.device("cpu"))
    inputs.uniforms_BN *= 0.9
    options = options_of(point, inputs)
    verdict = verify(inputs.logits_BNV, inputs.tokens_BN, inputs.parents_BN, **options)
    assert len(inputs.tree) == 16
    assert verdict.num_accepted_B.tolist() == inputs.accepted_B
    assert max(inputs.accepted_B) > 0


def test_figures_compare_the_best_launch():
    point = Point("greedy", 1, 32000, 64)
    times = {
        "1 x 1024": {"graph_cold": 8.0, "eager_cold": 30.0},
        "2 x 512": {"graph_cold": 4.0, "eager_cold": 20.0},
        "eager": {"graph_cold": 90.0, "eager_cold": 400.0},
        "split": {"graph_cold": 40.0, "eager_cold": 60.0},
    }
    entry = figures(point, {"all": 2.0, "needed": 1.0}, times)
    assert entry["best_config"] == "2 x 512" and entry["batch"] == 1
    assert entry["fraction_of_floor"] == {"all": 0.5, "needed": 0.25}
    assert entry["times_as_fast_as"] == {"eager": 100.0, "split": 10.0}


@pytest.mark.parametrize("has_clusters", [False, True])
def test_all_that_is_tried_can_be_launched(has_clusters):
    kernels = SimpleNamespace(num_processors=132, has_clusters=has_clusters)
    for point in points():
        chosen = launch_config(point.batch, 2 * point.vocab, kernels)
        tried = configs_of(chosen, kernels)
        assert {config.cluster for config in tried} == ({1, 2, 4, 8} if has_clusters else {1})
        assert len(tried) == len(set(tried))
        for config in tried:
            config.check(kernels)


def test_copies_are_thrice_the_cache():
    assert num_copies(4_000_000, 50_000_000) == 38
    assert num_copies(10**9, 50_000_000) == 1
    assert num_copies(1, 50_000_000) == 64


def test_what_fails_is_written_down_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def figures_of(name, scale, is_over):
        yield "B=1, 1 nodes, compiled", 4.0
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(run, "figures_of", figures_of)

    def part(name, seconds, most):
        if name == "machine":
            return {"failed": "ended after 65 s"}
        with pytest.raises(RuntimeError):
            run.write_part(name, SCALE, seconds, tmp_path / "part.json")
        return json.loads((tmp_path / "part.json").read_text())

    benchmark = run.Benchmark(tmp_path / "a.json", 8, is_rehearsal=True)
    monkeypatch.setattr(benchmark, "run_part", part)
    benchmark.run(["machine", "steps_7B"])
    found = json.loads((tmp_path / "a.json").read_text())
    assert "illegal memory access" in found["steps_7B"]["failed"]
    rows = {row["what"]: row for row in found["table"]}
    assert rows["7B, B=1, plain"]["is_cleared"] and rows["7B, B=1, plain"]["now"] == 4.0
    assert rows["from_scratch, device=cuda, all stages"]["is_cleared"] is None
    assert "not measured" in bars.shown(found["table"]).splitlines()[-1]
    assert "ended after 65 s" in capsys.readouterr().out


def test_without_time_no_part_begins(tmp_path):
    found = run.Benchmark(tmp_path / "a.json", 0, is_rehearsal=True).run(["machine"])
    assert found["machine"] == {"left_out": "no time left"}


def test_all_parts_together_end_in_time(monkeypatch, tmp_path):
    """Each may take what the ones before it have left, and none the seconds of those behind it."""
    now, given = [0.0], {}
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    benchmark = run.Benchmark(tmp_path / "a.json", 8, is_rehearsal=True)

    def part(name, seconds, most):
        given[name] = seconds, most
        now[0] += most - 40 if name == "steps_7B" else most
        return {}

    monkeypatch.setattr(benchmark, "run_part", part)
    benchmark.run([*run.PARTS])
    assert sum(run.PARTS.values()) == 8 * 60 and now[0] <= 8 * 60
    assert given["steps_7B"] == (run.PARTS["steps_7B"],) * 2
    assert given["steps_8B"] == (run.PARTS["steps_8B"], run.PARTS["steps_8B"] + 40)
    assert given["generate"] == (run.PARTS["generate"],) * 2


def test_a_part_is_ended_with_all_that_it_started(tmp_path):
    child = "import time; time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    )
    fault = run.fault_of([sys.executable, "-c", parent], tmp_path / "log", 2.0)
    assert fault == "ended after 2 s"
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")

    def is_gone():
        with suppress(FileNotFoundError, ProcessLookupError):
            return state.read_text().split()[2] == "Z"
        return True

    deadline = time.monotonic() + 20
    while not is_gone() and time.monotonic() < deadline:  # a killed process may end a little later
        time.sleep(0.05)
    assert is_gone()
    failing = [sys.executable, "-c", "raise SystemExit('too little memory')"]
    assert run.fault_of(failing, tmp_path / "log", 20.0) == "too little memory\n"
    assert run.fault_of([sys.executable, "-c", ""], tmp_path / "log", 20.0) is None


def test_a_bar_may_be_the_most_or_the_least():
    most = bars.Bar("a", "ms", "7", lambda found: found["a"], 4)
    least = bars.Bar("a", "x", "-", lambda found: found["a"], 4, is_most=False)
    for bar, cleared in ((most, [True, True, False]), (least, [False, True, True])):
        assert [bar.row({"a": now})["is_cleared"] for now in (3, 4, 5)] == cleared
        assert bar.row({})["now"] is None


def test_a_check_that_found_something_counts():
    right = {
        "steps": {"llama": []},
        "training": {"equal": True},
        "kernels": {"mismatches": [], "mask_and_commit": "equal"},
    }
    assert bars.faults({"correctness": right}) == 0
    assert bars.faults({"correctness": {**right, "steps": {"llama": ["captured, B=1"]}}}) == 1
    assert bars.faults({"correctness": {**right, "training": {"failed": "no hydra"}}}) == 1
    assert bars.faults({"correctness": {**right, "steps": {"llama": [], "left_out": "rest"}}}) == 0
    with pytest.raises(KeyError):
        bars.faults({"correctness": {**right, "steps": {"left_out": "from llama on"}}})


@pytest.fixture
def shim(tmp_path):
    if GXX is None:
        pytest.skip("there is no g++")
    return ShimKernels(tmp_path)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_point_is_judged_in_float64_and_a_failing_launch_costs_no_other(
    monkeypatch, shim, kernel
):
    launch = shim.launch

    def launch_some(file, defines, entry, *rest):
        if entry == "verify_8":
            raise RuntimeError("too many resources requested for launch")
        launch(file, defines, entry, *rest)

    monkeypatch.setattr(shim, "launch", launch_some)
    times = dict.fromkeys(("eager_warm", "eager_cold", "graph_warm", "graph_cold"), 1.0)
    monkeypatch.setattr(verification, "measure", lambda calls, **how: times)
    small = [LaunchConfig(threads=32), LaunchConfig(8, threads=32)]
    monkeypatch.setattr(verification, "configs_of", lambda *given: small)
    entry = verification.measure_point(shim, Point(kernel, 2, 300, 16), cache_bytes=1)
    assert list(entry["failed"]) == ["8 x 32"]
    assert entry["differs"] == {} and {*entry["times_us"]} == {"1 x 32", "eager"}


def test_a_draw_at_an_edge_is_told_from_a_wrong_one():
    point = Point("sampling", 3, 300, 16)
    inputs = make_inputs(point, torch.device("cpu"))
    right = verification.expected(point, inputs)
    assert verification.differences(point, inputs, right, right) == {}
    inputs.uniforms_BN[:] = 1 - 2**-24
    right = verification.expected(point, inputs)
    wrong = dataclasses.replace(right, next_token_B=right.next_token_B - 7)
    assert verification.differences(point, inputs, wrong, right) == {"sequences": 3, "near": 0}
    b, node, place = 1, int(right.path_BL[1, int(right.num_accepted_B[1])]), 0.4
    p_V = inputs.logits_BNV[b, node].double().softmax(-1)
    children = inputs.tokens_BN[b, inputs.parents_BN[b] == node]
    p_V[children] = 0.0
    token = int((p_V.cumsum(-1) < place).sum())
    inputs.uniforms_BN[b, node] = p_V.cumsum(-1)[token]
    after = int((p_V[token + 1 :] > 0).nonzero()[0]) + token + 1
    assert verification.is_near(inputs, b, node, token) and verification.is_near(
        inputs, b, node, after
    )
    assert not verification.is_near(inputs, b, node, after + 5)


def test_a_draw_of_traversal_at_an_edge_is_told_from_a_wrong_one():
    point = Point("traversal", 2, 300, 16)
    inputs = make_inputs(point, torch.device("cpu"))
    right = verification.expected(point, inputs)
    assert verification.differences(point, inputs, right, right) == {}
    other = dataclasses.replace(right, next_token_B=right.next_token_B + 1)
    assert verification.differences(point, inputs, other, right) == {"sequences": 2, "near": 0}
    low, high = 0.0, 1.0
    for _ in range(60):  # to an edge between two tokens
        inputs.uniforms_BN[0, 0] = (low + high) / 2
        token = int(verification.expected(point, inputs).next_token_B[0])
        low, high = (low, (low + high) / 2) if token > 150 else ((low + high) / 2, high)
    edge = [
        int(verification.expected_of_row(point, inputs, 0, s).next_token_B) for s in (-1e-7, 1e-7)
    ]
    assert edge[0] < edge[1]
    right.next_token_B[0] = edge[0]
    other = dataclasses.replace(right, next_token_B=right.next_token_B.clone())
    other.next_token_B[0] = edge[1]
    assert verification.differences(point, inputs, other, right) == {"sequences": 1, "near": 1}


@pytest.mark.parametrize(
    ("kernel", "measured", "methods"),
    [
        ("filter", drafts.measure_filters, {"1 x 512", "kernel and softmax", "torch"}),
        ("topk", drafts.measure_topk, {"2 x 512", "torch"}),
    ],
)
def test_kernels_are_timed_beside_torch(monkeypatch, shim, kernel, measured, methods):
    def called(calls, **how):
        calls[0]()
        return {"graph_warm": len(calls)}

    monkeypatch.setattr(drafts, "measure", called)
    some = ((1, 40), (2, 40))
    [[name, figures], _] = measured(shim, lambda: False, some)
    assert name.startswith(f"{kernel}, B=1, ")
    assert set(figures["times_us"]) == methods
    assert figures["microseconds"] == 1 and figures["failed"] == {}
    assert figures.get("ranks_otherwise", 0) == 0
    [[name, left_out]] = measured(shim, lambda: True, some)
    assert name == ("filters_left_out" if kernel == "filter" else "topk_left_out")
    assert left_out.startswith("from B=1, ")


def test_a_small_case_for_the_sanitizer(monkeypatch, shim):
    small = [LaunchConfig(threads=32), LaunchConfig(2, threads=32)]
    monkeypatch.setattr(kernel_device, "configs_of", lambda kernels: small)
    assert kernel_device.compare_small(shim) == []


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes seconds, and has tests of its own."""
    monkeypatch.setattr(decode_step, "CompiledLayers", lambda *given: None)


def test_steps_are_those_of_the_product(monkeypatch, uncompiled):
    made = []
    finish = step.CapturedStep.finish
    monkeypatch.setattr(step.CapturedStep, "finish", lambda s: made.append(s) or finish(s))
    found = dict(decode_step.measure_steps("8B", SCALE, lambda: False))
    for batch, nodes in ((1, 1), (1, 5), (2, 1), (2, 5)):
        for way in ("compiled", "eager"):
            assert found[f"B={batch}, {nodes} nodes, {way}"] > 0
    assert {step.drafter.num_nodes for step in made} == {1, 5}
    left_out = dict(decode_step.measure_steps("8B", SCALE, lambda: True))
    assert left_out["left_out"] == "from B=1, 1 nodes, compiled on"


def test_heads_hit_as_often_as_is_asked(uncompiled):
    found = dict(decode_step.measure_speedup("7B", SCALE, lambda: False, (0.7, 0.5, 0.4, 0.3)))
    for way in ("compiled", "eager"):
        ways = [found[f"{told}, {way}"] for told in ("plain", "chain", "16 nodes")]
        plain, chain, tree = (figures["tokens_per_step"] for figures in ways)
        assert plain == 1 < 1.2 < chain < tree < 4
        assert all(figures["identical"] for figures in ways)
    draws = torch.rand(20000, generator=torch.manual_seed(0))
    shares = models.places(draws, 0.6).bincount() / len(draws)
    assert shares.tolist() == pytest.approx([0.6, 0.2, 0.1, 0.05, 0.05], abs=0.02)


def test_captured_steps_that_say_otherwise_are_named(monkeypatch):
    monkeypatch.setattr(
        correctness,
        "CompiledLayers",
        lambda *given: SimpleNamespace(in_place=lambda cache: nullcontext(), is_refused=False),
    )
    backbone = Backbone(build_model("llama"))
    assert correctness.ways_that_differ(backbone, SCALE) == []
    monkeypatch.setattr(step.CapturedStep, "_mask_and_positions", _blind)
    differ = correctness.ways_that_differ(backbone, SCALE)
    assert "captured, B=1" in differ and "eager tree, B=1" not in differ


def test_rules_under_which_captured_steps_draw_otherwise_are_named(monkeypatch):
    backbone = Backbone(build_model("llama"))
    assert correctness.rules_that_differ(backbone) == []
    monkeypatch.setattr(step.CapturedStep, "_mask_and_positions", _blind)
    assert correctness.rules_that_differ(backbone) == [*correctness.RULES]


def _blind(self, draft):
    """Positions that are one too high."""
    lengths_B, columns = self.cache.lengths_B, self.cache.capacity
    mask = self.mask.over(lengths_B, columns, draft.ancestors_BNN, draft.depths_BN)
    return mask, lengths_B[:, None] + draft.depths_BN * 2


def test_training_is_measured_after_its_first_steps(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 2)
    found = dict(training.measure_training("8B", ("medusa_tied",), SCALE, lambda: False))
    figures, rate = found["medusa_tied"], found["matrix_product_teraflops"]
    assert 0 < 2 * 2 * 64 / figures["tokens_per_second"] < 60
    assert figures["share_of_matrix_product"] == pytest.approx(figures["teraflops"] / rate)
    backbone = models.random_llama(SCALE.shapes["8B"], SCALE)
    heads = build_heads(backbone, num_heads=training.NUM_HEADS, kind="medusa_tied")
    of = Operations.of(backbone, heads, runs_layers=True, asks_lm_head=True)
    counted = 2 * 2 * (64 * of.of_token + 64 * 65 / 2 * of.of_pair)  # 2 steps of 2 rows
    labels = 2 * 2 * training.TRAINED_SHARE * 64 * sum(of.of_label)
    needed = figures["teraflops"] * 1e12 * 2 * 2 * 64 / figures["tokens_per_second"]
    assert needed == pytest.approx(counted + labels, rel=0.05)
    left_out = dict(training.measure_training("8B", ("medusa",), SCALE, lambda: True))
    assert left_out["left_out"] == "medusa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "a.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "a.json").exists()


def test_no_stage_wants_the_client_of_engines_before_it_asks_one():
    """On a machine without a network that has a GPU, httpx2 may be missing."""
    stages = [f"import {name}" for name in STAGES.values()]
    code = "\n".join(["import sys", *stages, "print('medusa_exp.serving.client' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
