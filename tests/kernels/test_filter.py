"""Top-k and top-p by a kernel, run on the CPU, against the specification in float64."""

import functools
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
from kernel_cases import Case, hangs_on_a_digit, make_case
from kernel_checks import CONFIGS, assert_equal, judged
from kernel_shim import ORDERS

from medusa_exp.decode import rule
from medusa_exp.decode.cuda.filter import KernelFilter, filter_config
from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.verify import Verdict


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
    """Launched as on a device, too."""
    shim.order = "random"
    several = (filter_case(seed, vocab) for seed in itertools.count())
    clear = (case for case in several if not case.hangs_on_a_digit())
    check_filter(shim, itertools.islice(clear, 3))
    case, config = next(clear), filter_config(1, vocab, shim)
    found_BNV = KernelFilter(shim, LaunchConfig(config.cluster, 512))(
        case.logits_BNV, case.temperature, case.top_k, case.top_p
    )
    left_BNV = probabilities(found_BNV.double(), case.temperature)
    assert (left_BNV - case.expected).abs().max() < 1e-9


@functools.cache
def filtered_cases(kernel: str) -> list[tuple[Case, Verdict]]:
    """Return cases of verification with filters, and what is expected of them."""
    found = []
    for seed in range(24):
        case = make_case(seed, kernel)
        top_k, top_p = FILTERS[seed % 3]
        case = replace(case, options=case.options | {"top_k": top_k, "top_p": top_p})
        left = FilterCase(case.logits_BNV, case.options["temperature"], top_k, top_p)
        if not hangs_on_a_digit(case) and not left.hangs_on_a_digit():
            found.append((case, case.expected()))
    assert len(found) > 18
    return found


@pytest.mark.parametrize("config", CONFIGS[:4])
@pytest.mark.parametrize("kernel", ["sampling", "traversal"])
def test_verification_is_of_what_is_left(shim, kernel, config):
    for seed, (case, expected) in enumerate(filtered_cases(kernel)):
        assert_equal(judged(shim, config, case, seed=seed), expected)


def test_the_smallest_logits_are_told_apart(shim):
    """As a GPU computes, they are zero."""
    smallest_V = torch.tensor([1e-40, 2e-40, -1e-40, 0.0])
    torch.set_flush_denormal(True)
    try:
        found = KernelFilter(shim)(smallest_V[None, None], 1.0, 1, None)
    finally:
        torch.set_flush_denormal(False)
    assert (found > -torch.inf).tolist() == [[[False, True, False, False]]]


def test_the_kernel_is_launched_where_it_can_leave_something_out(monkeypatch, shim):
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
