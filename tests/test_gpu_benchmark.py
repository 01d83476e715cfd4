"""The parts of benchmarks/gpu.py that need no GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_checks
import gpu_grid
import gpu_step
import gpu_train
import pytest
import torch
from gpu_points import Point, figures, floors_us, forms_of, make_inputs, points, tree_of
from gpu_timing import num_copies
from kernel_shim import GXX, ShimKernels
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode.cuda.verify import Plan, check_plan, plan_for
from medusa_exp.decode.verify import verify
from medusa_exp.model import Backbone, build_heads

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


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


def test_figures_compare_the_best_form():
    point = Point("greedy", 1, 32000, 64)
    times = {
        "two": {"graph_cold": 8.0, "eager_cold": 30.0},
        "lazy": {"graph_cold": 4.0, "eager_cold": 20.0},
        "a": {"graph_cold": 90.0, "eager_cold": 400.0},
        "c": {"graph_cold": 40.0, "eager_cold": 60.0},
    }
    entry = figures(point, {"all": 2.0, "needed": 1.0}, times)
    assert entry["best_form"] == "lazy" and entry["batch"] == 1
    assert entry["fraction_of_floor"] == {"all": 0.5, "needed": 0.25}
    assert entry["times_as_fast_as"] == {"a": 100.0, "c": 10.0}


def test_all_forms_that_are_tried_can_be_launched():
    kernels = SimpleNamespace(num_processors=132, has_clusters=True)
    for point in points():
        shape = (point.batch, point.nodes, point.vocab)
        forms = forms_of(plan_for(shape, 2, kernels), shape, 2, kernels)
        assert {plan.form for plan in forms} == {"two", "fused", "lazy"}
        for plan in forms:
            check_plan(plan, kernels)


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
    benchmark = gpu.Benchmark(SimpleNamespace(device=0), out, minutes=8)
    for name in ("_check", "_check_step", "_sanitize", "_decode_step", "_split_walk", "_training"):
        monkeypatch.setattr(benchmark, name, fault if name != "_split_walk" else lambda: None)
    monkeypatch.setattr(gpu_grid, "measure_point", point)
    monkeypatch.setattr(gpu_grid, "measure_compiled", lambda kernels, point, grid: len(grid))
    monkeypatch.setattr(gpu, "_machine", fault)
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
def test_a_point_is_judged_in_float64_and_a_failing_form_costs_no_other(monkeypatch, shim, rule):
    launch = shim.launch

    def launch_some(file, defines, entry, *rest):
        if entry == "lazy_8":
            raise RuntimeError("too many resources requested for launch")
        launch(file, defines, entry, *rest)

    monkeypatch.setattr(shim, "launch", launch_some)
    times = dict.fromkeys(("eager_warm", "eager_cold", "graph_warm", "graph_cold"), 1.0)
    monkeypatch.setattr(gpu_grid, "measure", lambda calls, **how: times)
    small = [Plan("two", threads=32, walk_threads=64), Plan("lazy", threads=32, cluster=8)]
    monkeypatch.setattr(gpu_grid, "forms_of", lambda *given: small)
    entry = gpu_grid.measure_point(shim, Point(rule, 2, 300, 16), cache_bytes=1)
    assert list(entry["failed"]) == ["lazy 1 32 8"]
    assert entry["differs"] == {} and {*entry["times_us"]} == {"two 1 32 1", "a"}


def test_a_draw_at_an_edge_is_told_from_a_wrong_one():
    point = Point("sampling", 3, 300, 16)
    inputs = make_inputs(point, torch.device("cpu"))
    right = gpu_grid.expected(point, inputs)
    assert gpu_grid.differences(point, inputs, right, right) == {}
    inputs.uniforms_BN[:] = 1 - 2**-24
    right = gpu_grid.expected(point, inputs)
    wrong = dataclasses.replace(right, next_token_B=right.next_token_B - 7)
    assert gpu_grid.differences(point, inputs, wrong, right) == {"sequences": 3, "near": 0}
    b, node, place = 1, int(right.path_BL[1, int(right.num_accepted_B[1])]), 0.4
    p_V = inputs.logits_BNV[b, node].double().softmax(-1)
    children = inputs.tokens_BN[b, inputs.parents_BN[b] == node]
    p_V[children] = 0.0
    token = int((p_V.cumsum(-1) < place).sum())
    inputs.uniforms_BN[b, node] = p_V.cumsum(-1)[token]
    after = int((p_V[token + 1 :] > 0).nonzero()[0]) + token + 1
    assert gpu_grid.is_near(inputs, b, node, token) and gpu_grid.is_near(inputs, b, node, after)
    assert not gpu_grid.is_near(inputs, b, node, after + 5)


def test_a_small_case_for_the_sanitizer(monkeypatch, shim):
    small = [Plan("two", splits=3, threads=32, walk_threads=32), Plan("fused", threads=32)]
    monkeypatch.setattr(gpu_checks, "plans_of", lambda kernels: small)
    assert gpu_checks.check_small(shim) == []


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_is_the_same_with_kernels_and_without(monkeypatch, shim, batch):
    for name, value in {"PAST": 20, "NODES": 16, "VOCAB": VOCAB_SIZE}.items():
        monkeypatch.setattr(gpu_step, name, value)
    step = gpu_step.Step(Backbone(build_model("llama")), shim, batch)
    verdicts, kept = [], []
    with torch.inference_mode():
        for has_kernels in (False, True):
            verdicts.append(step.run(has_kernels))
            kept.append([state[:, :, : 20 + 1].clone() for state in step.states])
    for field in ("path_BL", "num_accepted_B", "next_token_B"):
        assert getattr(verdicts[0], field).equal(getattr(verdicts[1], field))
    assert all(map(torch.equal, *kept))


def test_what_training_needs_is_counted_once():
    backbone = Backbone(build_model("llama"))
    heads = build_heads(backbone, num_heads=2)
    config = backbone.model.config
    layers = sum(p.numel() for p in backbone.body.layers.parameters() if p.ndim == 2)
    width, looked_at = config.hidden_size, gpu_train.LENGTH / 2
    of_a_token = 2 * layers + config.num_hidden_layers * 2 * 2 * looked_at * width
    assert gpu_train.operations(backbone, heads, 3, 0) == 3 * of_a_token
    block, projection = width * width, width * VOCAB_SIZE
    of_a_label = 2 * projection + 2 * (2 * 2 * block + 3 * 2 * projection)
    assert gpu_train.operations(backbone, heads, 3, 5) == 3 * of_a_token + 5 * of_a_label


def test_training_is_measured_after_its_first_steps(monkeypatch):
    small = {"LENGTH": 64, "ROWS": 2, "NUM_HEADS": 2, "STEPS": 2, "MATRIX_SIZE": 64}
    for name, value in small.items():
        monkeypatch.setattr(gpu_train, name, value)
    backbone = Backbone(build_model("llama").eval().requires_grad_(False))
    found = gpu_train.measure_training(backbone, lambda: False)
    assert [entry["loss_form"] for entry in found] == ["recompute", "at_once"]
    for entry in found:
        tokens = 2 * 2 * 64
        needed = gpu_train.operations(
            backbone, build_heads(backbone, num_heads=2), tokens, round(0.6 * tokens)
        )
        seconds = tokens / entry["tokens_per_second"]
        assert 0 < seconds < 60
        assert entry["teraflops"] == pytest.approx(needed / seconds / 1e12)
        share = entry["teraflops"] / entry["matrix_product_teraflops"]
        assert entry["share_of_matrix_product"] == pytest.approx(share)
    [left_out, _] = gpu_train.measure_training(backbone, lambda: True)
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
