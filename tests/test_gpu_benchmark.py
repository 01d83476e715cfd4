"""The parts of benchmarks/gpu that need no GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernel_device
import pytest
import torch
from gpu import decode_step, run, training, verification
from gpu.points import Point, configs_of, figures, floors_us, make_inputs, points, tree_of
from gpu.timing import num_copies
from kernel_shim import GXX, ShimKernels
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode import step
from medusa_exp.decode.cuda.verify import LaunchConfig, launch_config
from medusa_exp.decode.verify import verify
from medusa_exp.model import Backbone, build_heads

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def test_the_grid_has_every_combination_once():
    grid = points()
    assert len(grid) == len(set(grid)) == 6 * 3 * 2 * 3
    assert grid[0] == Point("greedy", 1, 32000, 64)


def test_floors_of_the_fact_sheet():
    """64 nodes over 128256 tokens in bfloat16, B = 1: 5.5 us for all rows, 2.0 for 22 + 1."""
    tree = tree_of(64)
    assert len(tree) == 64 and len(set(tree.parents) - {-1}) == 22
    floors = floors_us(Point("sampling", 1, 128256, 64), tree, [2])
    assert floors["all"] == pytest.approx(5.47, abs=0.01)
    assert floors["needed"] == pytest.approx(1.97, abs=0.01)
    assert floors["path"] == pytest.approx(3 * 5.47 / 64, abs=0.01)


@pytest.mark.parametrize("rule", ["greedy", "typical", "sampling"])
def test_inputs_accept_what_they_promise(rule):
    inputs = make_inputs(Point(rule, 5, 3000, 16), torch.device("cpu"))
    options = {"uniforms_BN": inputs.uniforms_BN * 0.9} if rule == "sampling" else {}
    verdict = verify(inputs.logits_BNV, inputs.tokens_BN, inputs.parents_BN, rule=rule, **options)
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


def test_what_fails_is_written_down_and_the_rest_goes_on(monkeypatch, tmp_path):
    def fault(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    def point(kernels, point, *rest):
        return fault() if point == points()[1] else {"batch": point.batch, "rule": point.rule}

    out = tmp_path / "a.json"
    benchmark = run.Benchmark(SimpleNamespace(device=0), out, minutes=8)
    monkeypatch.setattr(benchmark, "_split_walk", lambda: None)
    for name in ("_check", "_check_step", "_test", "_sanitize", "_decode_step", "_training"):
        monkeypatch.setattr(benchmark, name, fault)
    monkeypatch.setattr(verification, "measure_point", point)
    monkeypatch.setattr(verification, "measure_compiled", lambda kernels, point, grid: len(grid))
    monkeypatch.setattr(run, "_machine", fault)
    monkeypatch.setattr(torch.cuda, "empty_cache", fault)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1)
    )
    benchmark.run(1)
    found = json.loads(out.read_text())
    for name in (
        "machine",
        "verification",
        "mask_and_commit",
        "tests",
        "sanitizer",
        "decode_step",
        "training",
    ):
        assert "illegal memory access" in found[name]["failed"]
    assert len(found["grid"]) == len(points())
    assert ["failed" in entry for entry in found["grid"][:3]] == [False, True, False]
    assert found["compiled"] == [len(points())] * 9


@pytest.fixture
def shim(tmp_path):
    if GXX is None:
        pytest.skip("there is no g++")
    return ShimKernels(tmp_path)


@pytest.mark.parametrize("rule", ["greedy", "typical", "sampling"])
def test_a_point_is_judged_in_float64_and_a_failing_launch_costs_no_other(monkeypatch, shim, rule):
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
    entry = verification.measure_point(shim, Point(rule, 2, 300, 16), cache_bytes=1)
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


def test_a_small_case_for_the_sanitizer(monkeypatch, shim):
    small = [LaunchConfig(threads=32), LaunchConfig(2, threads=32)]
    monkeypatch.setattr(kernel_device, "configs_of", lambda kernels: small)
    assert kernel_device.compare_small(shim) == []


def test_steps_are_those_of_the_product(monkeypatch, shim):
    """Captured steps (which run as they are on a CPU) are asked for, and eager ones; all decode."""
    small = {"PAST": 20, "NODES": (1, 16), "STEPS": 6, "WARM_UP": 2}
    for name, value in small.items():
        monkeypatch.setattr(decode_step, name, value)
    times = dict.fromkeys(("eager_warm", "eager_cold", "graph_warm", "graph_cold"), 1.0)
    monkeypatch.setattr(decode_step, "measure", lambda calls: [call() for call in calls] and times)
    made = []
    for kind in (step.CapturedStep, step.EagerStep):
        monkeypatch.setattr(kind, "__call__", _noting(kind.__call__, made))
    backbone = Backbone(build_model("llama").eval())
    found = decode_step.measure_steps(shim, backbone, (1, 2), lambda: False)
    assert [(entry["batch"], entry["nodes"]) for entry in found] == [
        (1, 1),
        (1, 16),
        (2, 1),
        (2, 16),
    ]
    for entry in found:
        assert set(entry["step_us"]) == {"captured", "captured_torch", "eager"}
        assert min(entry["step_us"].values()) > 0
        assert entry["verification_share"] == 1 / entry["step_us"]["captured"]
    assert {type(one) for one in made} == {step.CapturedStep, step.EagerStep}
    [left_out, *_] = decode_step.measure_steps(shim, backbone, (1,), lambda: True)
    assert left_out["left_out"] == "no time left"


def _noting(call, made):
    def noted(self):
        made.append(self)
        return call(self)

    return noted


def test_what_training_needs_is_counted_once():
    backbone = Backbone(build_model("llama"))
    heads = build_heads(backbone, num_heads=2)
    config = backbone.model.config
    layers = sum(p.numel() for p in backbone.body.layers.parameters() if p.ndim == 2)
    width, looked_at = config.hidden_size, training.LENGTH / 2
    of_a_token = 2 * layers + config.num_hidden_layers * 2 * 2 * looked_at * width
    assert training.operations(backbone, heads, 3, 0) == 3 * of_a_token
    block, projection = width * width, width * VOCAB_SIZE
    of_a_label = 2 * projection + 2 * (2 * 2 * block + 3 * 2 * projection)
    assert training.operations(backbone, heads, 3, 5) == 3 * of_a_token + 5 * of_a_label


def test_training_is_measured_after_its_first_steps(monkeypatch):
    small = {"LENGTH": 64, "ROWS": 2, "NUM_HEADS": 2, "STEPS": 2, "MATRIX_SIZE": 64}
    for name, value in small.items():
        monkeypatch.setattr(training, name, value)
    backbone = Backbone(build_model("llama").eval().requires_grad_(False))
    found = training.measure_training(backbone, lambda: False)
    assert [entry["loss_form"] for entry in found] == ["recompute", "at_once"]
    for entry in found:
        tokens = 2 * 2 * 64
        needed = training.operations(
            backbone, build_heads(backbone, num_heads=2), tokens, round(0.6 * tokens)
        )
        seconds = tokens / entry["tokens_per_second"]
        assert 0 < seconds < 60
        assert entry["teraflops"] == pytest.approx(needed / seconds / 1e12)
        share = entry["teraflops"] / entry["matrix_product_teraflops"]
        assert entry["share_of_matrix_product"] == pytest.approx(share)
    [left_out, _] = training.measure_training(backbone, lambda: True)
    assert left_out == {"loss_form": "recompute", "left_out": "no time left"}


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
