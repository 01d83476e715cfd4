"""The verification kernels, run on the CPU, against the specification in float64."""

import itertools
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_cases import KERNELS, Case, cases_alike, changed, exact_cases, is_borderline, make_case
from kernel_checks import CONFIGS, assert_equal, cases_of, check_verification, judged
from kernel_shim import ORDERS, ShimError, ShimKernels
from tiny_models import FixedHeads

from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.sampled import Drawn
from medusa_exp.tree import Tree

CASES, CHUNKS = int(os.environ.get("KERNEL_TEST_CASES", "350")), 7
"""Of each kernel; fewer under a sanitizer."""


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_specification_in_every_order(shim, kernel, chunk):
    check_verification(shim, cases_of(kernel, range(chunk, CASES, CHUNKS)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_edges_are_the_specifications(shim, kernel):
    check_verification(shim, [(case, case.expected()) for case in exact_cases(kernel)])


@pytest.mark.parametrize("vocab", [4099, 32000, 262144])
@pytest.mark.parametrize("kernel", KERNELS)
def test_large_vocabularies(shim, kernel, vocab):
    for seed, config in enumerate(
        (LaunchConfig(threads=128), LaunchConfig(2, threads=96), LaunchConfig(4, threads=64))
    ):
        several = (make_case(n, kernel, vocab, nodes=3) for n in itertools.count(1000 + seed, 3))
        case = next(case for case in several if not is_borderline(case))
        assert_equal(judged(shim, config, case), case.expected())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("config", CONFIGS[:3])
def test_the_largest_tree_and_a_large_batch(shim, kernel, config):
    case = make_case(3, kernel, vocab=7, nodes=256)
    assert not is_borderline(case)
    assert_equal(judged(shim, config, case), case.expected())
    case = make_case(5, kernel, vocab=2, nodes=2)
    assert not is_borderline(case)
    case = changed(case, lambda value: value.repeat(100, *[1] * (value.ndim - 1)))
    assert_equal(judged(shim, config, case), case.expected())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_call_again(shim, kernel, config):
    """Nothing of the last call is left: what a CUDA graph relies on."""
    verifier = KernelVerify(shim, config)
    shim.order = "random"
    for seed, case in enumerate(cases_alike(kernel, 5)):
        shim.seed = seed
        found = verifier(
            case.logits_BNV, case.tokens_BN, case.parents_BN, rule=case.rule, **case.options
        )
        assert_equal(found, case.expected())


@pytest.mark.parametrize("config", CONFIGS[:4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nonsense_has_an_end(shim, kernel, config):
    """Parents in circles, tokens of no vocabulary, depths that are too small: a defined outcome."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        parents_BN = torch.from_numpy(rng.integers(-300, 300, (2, 12)))
        parents_BN[:, 3:6] = torch.tensor([[4, 5, 3], [2, 3, 3]])
        tokens_BN = torch.from_numpy(rng.integers(-3, 8, (2, 12)))
        logits_BNV = torch.from_numpy(rng.normal(0, 3, (2, 12, 5))).float()
        options = {"max_depth": int(rng.integers(0, 14))}
        if kernel in ("sampling", "traversal"):
            options["uniforms_BN"] = torch.from_numpy(rng.random((2, 12))).float()
        if kernel == "traversal":
            odd_BQW = rng.choice([0.0, 0.5, 1.0, -1.0, 1e30, np.inf, np.nan], (2, 3, 5))
            q_BQW = torch.from_numpy(odd_BQW).float()
            options["drawn"] = Drawn(q_BQW, (0, 1, 2) * 4, ((),) * 12)
        case = Case(kernel, logits_BNV, tokens_BN, parents_BN, options)
        verdict = judged(shim, config, case)
        depth = min(options["max_depth"], 11)
        assert verdict.path_BL.shape == (2, depth + 1)
        assert ((verdict.next_token_B >= 0) & (verdict.next_token_B < 5)).all()
        assert ((verdict.num_accepted_B >= 0) & (verdict.num_accepted_B <= depth)).all()
        for b, path in enumerate(verdict.path_BL.tolist()):
            nodes = path[: int(verdict.num_accepted_B[b]) + 1]
            assert nodes[0] == 0 and set(path[len(nodes) :]) <= {-1}
            for parent, node in itertools.pairwise(nodes):
                assert parents_BN[b, node] == parent < node
                assert 0 <= tokens_BN[b, node] < 5


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_draws_below_the_greatest_depth_are_not_tried(shim, config):
    number = 0
    for seed, depth in itertools.product(range(40), range(3)):
        case = make_case(seed, "traversal", vocab=40, nodes=9)
        cut = replace(case, options=case.options | {"max_depth": depth})
        above_BN, drawn = _above(case.parents_BN, depth), case.options["drawn"]
        left = tuple(tuple(n for n in some if above_BN[0, n] >= 0) for some in drawn.children)
        pruned = replace(
            cut,
            parents_BN=above_BN,
            options=cut.options | {"drawn": replace(drawn, children=left)},
        )
        if not is_borderline(pruned):
            number += 1
            assert_equal(judged(shim, config, cut, seed=seed), pruned.expected())
    assert number > 80


def _above(parents_BN: torch.Tensor, depth: int) -> torch.Tensor:
    """Return parents where nodes that are deeper are padding."""
    depths_BN = torch.zeros_like(parents_BN)
    for node in range(1, parents_BN.shape[1]):
        parent_B1 = parents_BN[:, node : node + 1]
        depths_BN[:, node] = torch.where(
            parent_B1 >= 0, depths_BN.gather(1, parent_B1.clamp(min=0)) + 1, 0
        )[:, 0]
    return parents_BN.masked_fill(depths_BN > depth, -1)


@pytest.mark.parametrize("gap", [6.5, 6.9, 7.5, 8.5, 9.2])
def test_the_smallest_numbers_are_not_missed(shim, gap):
    """A head that is nearly sure, at temperature 0.1, where as on a GPU the smallest are zero."""
    rows, tree = 300, Tree.from_paths([(0,), (1,), (2,)])
    rule = AcceptanceRule("sampling", 0.1, draft="sampled")
    heads = FixedHeads(torch.tensor([[gap, 0.3, 0.2, 0.15, 0.1, 0.0]]))
    drafter = build_drafter(heads, tree, torch.device("cpu"), rule)
    generator = torch.Generator().manual_seed(0)
    numbers_BU = torch.rand(rows, drafter.num_uniforms, generator=generator)
    draft = drafter(torch.zeros(rows, dtype=torch.long), torch.zeros(rows, 2), numbers_BU)
    p_V = torch.tensor([0.5, 0.36, 0.06, 0.04, 0.02, 0.02])
    logits_BNV = (0.1 * p_V.log()).expand(rows, 4, -1).contiguous()
    options = {"temperature": 0.1, "uniforms_BN": numbers_BU, "drawn": draft.drawn}
    case = Case("traversal", logits_BNV, draft.tokens_BN, draft.parents_BN, options)
    expected = case.expected()
    torch.set_flush_denormal(True)
    try:
        found = judged(shim, LaunchConfig(threads=32), case)
    finally:
        torch.set_flush_denormal(False)
    differ_B = (found.path_BL != expected.path_BL).any(1)
    differ_B |= found.next_token_B != expected.next_token_B
    assert differ_B.sum() <= 1
    assert (expected.num_accepted_B > 0).float().mean() > (0.6 if gap < 6.6 else 0.4)


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_tokens_without_probability_are_never_drawn(shim, config):
    """Not even by a uniform of exactly 0, or by one so near to 1 that rounding leaves nothing."""
    logits_BNV = torch.full((4, 3, 300), -math.inf)
    logits_BNV[:, :, [40, 41, 170]] = torch.tensor([1.0, 0.0, 0.5])
    uniforms_BN = torch.tensor([0.0, 1 - 2**-24, 0.0, 1 - 2**-24])[:, None].expand(4, 3)
    tokens_BN = torch.tensor([[0, 7, 40], [0, 7, 170], [0, 40, 7], [0, 200, 299]])
    parents_BN = torch.tensor([[-1, 0, 0]]).expand(4, 3)
    case = Case(
        "sampling", logits_BNV, tokens_BN, parents_BN, {"uniforms_BN": uniforms_BN.contiguous()}
    )
    verdict = judged(shim, config, case)
    assert verdict.path_BL.tolist() == [[0, 2, -1], [0, -1, -1], [0, 1, -1], [0, -1, -1]]
    assert verdict.next_token_B.tolist() == [40, 41, 40, 170]


# Places of the draw at which sums that round in different orders leave a gap between two threads.
GAPS = (
    (11, 0.6347712874412537),
    (11, 0.9999998807907104),
    (12, 0.7024404406547546),
    (14, 0.8612672090530396),
    (16, 0.4698032736778259),
    (20, 0.8842995166778564),
)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("seed", "uniform"), GAPS)
def test_a_draft_token_that_was_rejected_is_not_drawn_in_a_gap(shim, seed, uniform, order):
    rng = np.random.default_rng(seed)
    logits_V = rng.normal(0, 1, 32).astype(np.float32)
    logits_V[rng.random(32) < 0.6] = -np.inf
    likeliest = int(logits_V.argmax())
    case = Case(
        "sampling",
        torch.from_numpy(logits_V).expand(1, 2, 32),
        torch.tensor([[0, likeliest]]),
        torch.tensor([[-1, 0]]),
        {"uniforms_BN": torch.full((1, 2), uniform)},
    )
    verdict = judged(shim, LaunchConfig(threads=32), case, order)
    assert verdict.num_accepted_B.tolist() == [0]
    assert verdict.next_token_B.item() != likeliest
    assert np.isfinite(logits_V[verdict.next_token_B.item()])


def test_the_shim_sees_a_barrier_that_not_all_reach(tmp_path):
    """A test that cannot fail is no test: threads that leave, and threads at different barriers."""
    (tmp_path / "bad.cu").write_text(
        "struct Arguments { long long kind; };\n"
        'extern "C" __global__ void wait(Arguments a) {\n'
        "    if (a.kind == 0 && threadIdx.x < 5) { __shfl_sync(0xffffffffu, 1, 0); }\n"
        "    if (a.kind == 1) { if (threadIdx.x < 5) __syncthreads(); else __syncthreads(); }\n"
        "}\n"
    )
    kernels = ShimKernels(tmp_path, tmp_path)
    for kind, message in enumerate(("deadlock", "different barriers")):
        with pytest.raises(ShimError, match=message):
            kernels.launch("bad.cu", (), "wait", (1, 1, 1), 32, np.array([kind]))
    kernels.launch("bad.cu", (), "wait", (1, 1, 1), 32, np.array([2]))
