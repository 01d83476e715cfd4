"""Top-k and top-p by a kernel, run on the CPU, against the specification in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from filter_cases import (
    FILTERS,
    FilterCase,
    check_filter,
    clear_filter_cases,
    exact_filter_cases,
    filter_case,
)
from kernel_cases import hangs_on_a_digit, make_case
from kernel_checks import CONFIGS, assert_equal, judged
from kernel_shim import ORDERS

from medusa_exp.decode import rule
from medusa_exp.decode.cuda.filter import KernelFilter
from medusa_exp.decode.cuda.launch import LaunchConfig


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_specification(shim, order):
    shim.order = order
    check_filter(shim, clear_filter_cases(range(150)))


@pytest.mark.parametrize("order", ORDERS)
def test_ties_are_parted_where_the_specification_parts_them(shim, order):
    shim.order = order
    check_filter(shim, exact_filter_cases())


@pytest.mark.parametrize("vocab", [4099, 32000, 151936])
def test_large_vocabularies(shim, vocab):
    several = (filter_case(seed, vocab) for seed in itertools.count())
    check_filter(shim, itertools.islice((c for c in several if not c.hangs_on_a_digit()), 4))


@pytest.mark.parametrize("config", CONFIGS[:4])
@pytest.mark.parametrize("kernel", ["sampling", "traversal"])
def test_verification_is_of_what_is_left(shim, kernel, config):
    compared = 0
    for seed in range(24):
        case = make_case(seed, kernel)
        top_k, top_p = FILTERS[seed % 3]
        case = replace(case, options=case.options | {"top_k": top_k, "top_p": top_p})
        left = FilterCase(case.logits_BNV, case.options["temperature"], top_k, top_p)
        if not hangs_on_a_digit(case) and not left.hangs_on_a_digit():
            assert_equal(judged(shim, config, case, seed=seed), case.expected())
            compared += 1
    assert compared > 18


def test_the_smallest_logits_are_told_apart(shim):
    """As a GPU computes, they are zero."""
    smallest_V = torch.tensor([1e-40, 2e-40, -1e-40, 0.0])
    torch.set_flush_denormal(True)
    try:
        found = KernelFilter(shim)(smallest_V[None, None], 1.0, 1, None)
    finally:
        torch.set_flush_denormal(False)
    assert (found > -torch.inf).tolist() == [[[False, True, False, False]]]


def test_where_nothing_is_left_out_nothing_is_launched(monkeypatch, shim):
    monkeypatch.setattr(rule, "step_kernels", lambda name, device: shim)
    filtered = rule.pick_probabilities("auto", shim.device)
    case, logits_BNV = make_case(0, "sampling"), torch.zeros(1, 2, 8)
    before, thirds = len(shim.launched), pytest.approx([1 / 3] * 3 + [0.0] * 5)
    for top_k, top_p in ((None, None), (None, 1.0), (8, None), (100, 1.0)):
        assert filtered(logits_BNV, 1.0, top_k, top_p).equal(torch.full((1, 2, 8), 1 / 8))
    assert filtered(logits_BNV.double(), 1.0, 2, 0.3)[0, 0].tolist() == thirds
    options = case.options | {"top_k": case.logits_BNV.shape[2], "top_p": 1.0}
    judged(shim, CONFIGS[0], replace(case, options=options))
    assert shim.launched[before:] == ["verify_1"]
    assert filtered(logits_BNV, 1.0, None, 0.3)[0, 0].tolist() == thirds
    assert shim.launched[before + 1 :] == ["filter_1"]


def test_what_cannot_be_filtered(monkeypatch, shim):
    logits_BNV = torch.zeros(2, 3, 8)
    kernel = KernelFilter(shim)
    assert kernel(logits_BNV, 1.0, None, None).equal(logits_BNV)
    for top_k, top_p in ((0, None), (None, 0.0), (None, -1.0)):
        with pytest.raises(ValueError, match="at least 1"):
            kernel(logits_BNV, 1.0, top_k, top_p)
    for logits, message in (
        (logits_BNV.double(), "torch.float64"),
        (logits_BNV[0], r"\[B, N, V\]"),
        (logits_BNV[:, :0], r"\[B, N, V\]"),
        (logits_BNV.transpose(1, 2), "contiguous along V"),
        (logits_BNV.to("meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(logits, 1.0, 2, 0.5)
    monkeypatch.setattr(shim, "has_clusters", False)
    with pytest.raises(ValueError, match="sm_90"):
        KernelFilter(shim, LaunchConfig(2))(logits_BNV, 1.0, 2, 0.5)
