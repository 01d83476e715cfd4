"""The tests of the kernels are tested: a fault put in on purpose must be noticed.

`nox -s mutations` puts in each of these faults, and removes every barrier in turn; the daily suite
tries one fault of each kernel.
"""

import functools

import pytest
from filter_cases import check_filter, clear_filter_cases, exact_filter_cases
from kernel_cases import exact_cases
from kernel_checks import (
    COMMITS,
    cases_of,
    check_commit,
    check_commit_within,
    check_draws,
    check_mask,
    check_verification,
    mask_cases,
)
from kernel_mutants import is_caught, mutate
from kernel_shim import GXX
from topk_cases import check_topk, exact_topk_cases, topk_case

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")

BARRIER = "__syncthreads();"
FAULTS = [
    # a comparison
    ("greedy", "logits.cuh", "if (x > s.largest) {", "if (x >= s.largest) {"),
    ("greedy", "rows.cuh", "if (largest > s.largest) {", "if (largest >= s.largest) {"),
    ("sampling", "sampling.cu", "p > 0.0f && u < spent + end", "p > 0.0f && u <= spent + end"),
    ("sampling", "draw.cuh", "before <= target", "before < target"),
    ("sampling", "draw.cuh", "target < before + end", "target <= before + end"),
    ("sampling", "draw.cuh", "__ffs(passing) - 1", "__ffs(passing)"),
    ("sampling", "draw.cuh", "sum > target)", "sum >= target)"),
    ("traversal", "traversal.cu", "[node] < scratch.frame[node]", "[node] <= scratch.frame[node]"),
    (
        "traversal",
        "traversal.cu",
        "before += tree.parent[m] < parent",
        "before += tree.parent[m] <= parent",
    ),
    ("typical", "typical.cu", "is_accepted[n] = p > threshold", "is_accepted[n] = p >= threshold"),
    ("commit", "commit.cu", "column < a.num_columns", "column <= a.num_columns"),
    ("mask", "mask.cu", "column < length", "column <= length"),
    ("mask", "mask.cu", "steps < a.window", "steps <= a.window"),
    ("draws", "draws.cu", "if (warp == token / length)", "if (false)"),
    ("draws", "draws.cu", ">> lane & 1)) sum", ">> lane & 0)) sum"),
    ("filter", "filter.cu", "before < goal && goal <=", "before <= goal && goal <"),
    ("filter", "filter.cu", "token <= last", "token < last"),
    ("filter", "filter.cu", "return of <= kept ?", "return of < kept ?"),
    ("topk", "topk.cu", "if (candidate > before)", "if (candidate >= before)"),
    ("topk", "topk.cu", "best[slice] < candidate", "best[slice] <= candidate"),
    ("topk", "topk.cu", "max(own - 1, 0) >= num", "own >= num"),
    ("topk", "topk.cu", "max(own - 1, 0) >= num", "max(own - 1, 0) + 1 >= num"),
    ("topk", "topk.cu", "[list][n] < candidate", "[list][n] <= candidate"),
    ("topk", "topk.cu", "place / num_ranks != m", "place / num_ranks > m"),
    ("topk", "topk.cu", "tail < to", "tail + 1 < to"),
    ("topk", "topk.cu", "if (from + lane < body)", "if (from + lane + 1 < body)"),
    ("topk", "topk.cu", "if (own == 0) list = better", "list = better"),
    ("topk", "topk.cu", "own + 1 < num_ranks) candidate", "own + 2 < num_ranks) candidate"),
    ("topk", "logits.cuh", "if (bits == 0x80000000u) bits = 0u;", ""),
    # an off-by-one in a walk
    ("greedy", "greedy.cu", "int first = node + 1;", "int first = node + 2;"),
    ("greedy", "tree.cuh", "return length;", "return length + 1;"),
    ("sampling", "sampling.cu", "int first = node + 1;", "int first = node + 2;"),
    ("traversal", "traversal.cu", "i <= last", "i < last"),
    ("traversal", "traversal.cu", "place >= 0; n = tree", "place > 0; n = tree"),
    ("typical", "typical.cu", "place = best.length - 1,", "place = best.length - 2,"),
    ("commit", "commit.cu", "a.num_accepted_B[row] + 1", "a.num_accepted_B[row]"),
    ("mask", "mask.cu", "steps[n] = depth++", "steps[n] = ++depth"),
    # a barrier less
    ("greedy", "tree.cuh", f"{BARRIER}\n        if (tree.path", "if (tree.path"),
    ("sampling", "draw.cuh", f"{BARRIER}\n    float total", "float total"),
    ("traversal", "traversal.cu", f"{BARRIER}\n    return true;", "return true;"),
    ("traversal", "traversal.cu", f"if (is_new) {BARRIER}", ""),
    ("draws", "draws.cu", f"scratch, length);\n    {BARRIER}", "scratch, length);"),
    ("draws", "draws.cu", f"scratch, length);\n        {BARRIER}", "scratch, length);"),
    # a number, or the order of some, that is not quite right
    ("filter", "filter.cu", "if (shift == UNUSED) break;", "if (shift < UNUSED + 8) break;"),
    ("filter", "filter.cu", "(float)(needed - 1)", "(float)needed"),
    ("filter", "filter.cu", "(missing % each > 0)", "1"),
    ("filter", "filter.cu", "there + part < part", "false"),
    ("filter", "logits.cuh", "if (bits == 0x80000000u) bits = 0u;", ""),
    ("filter", "filter.cu", "low >> 31 ? low : low | UNUSED_BITS", "low"),
    ("filter", "filter.cu", " == distance)\n                next", " >= 0)\n                next"),
    ("filter", "logits.cuh", "> 0x7f800000u) bits", "> 0xff800000u) bits"),
    ("topk", "logits.cuh", "> 0x7f800000u) bits", "> 0xff800000u) bits"),
    # a rule that is not quite the paper's
    ("traversal", "traversal.cu", "left.weight * p / left.p_sum", "p / left.p_sum"),
    (
        "traversal",
        "traversal.cu",
        "left.p_sum / left.weight / left.q_sum",
        "left.p_sum / left.q_sum",
    ),
    ("traversal", "traversal.cu", "left.weight * sums.sum / left.p_sum", "left.weight * sums.sum"),
    ("traversal", "traversal.cu", "(p_left + 1.0f - left.weight)", "(p_left + 1.0f)"),
    ("traversal", "traversal.cu", "left.q_sum = sums.slope;", ""),
    ("traversal", "traversal.cu", "&& !tree.is_copy[child]", ""),
    ("traversal", "traversal.cu", "return place >= 0 ?", "return true ?"),
    ("typical", "typical.cu", f"n == 0;\n    {BARRIER}", "n == 0;"),
    ("typical", "typical.cu", f"scratch);\n    {BARRIER}", "scratch);"),
    ("sampling", "tree.cuh", "cluster_sync<CLUSTER>();  // of the cluster", "// of the cluster"),
    ("mask", "mask.cu", f"{BARRIER}\n    if (threadIdx", "if (threadIdx"),
]


@functools.cache
def cases(kernel: str):
    """Return what a kernel is tried on; the expectations are made before any process is forked."""
    if kernel == "mask":
        return [mask_cases(architecture, range(12)) for architecture in ("llama", "mistral")]
    if kernel == "filter":
        made = exact_filter_cases() + clear_filter_cases(range(100))
        assert all(case.expected is not None for case in made)
        return exact_filter_cases() + made
    if kernel == "topk":
        made = exact_topk_cases() * 7 + [topk_case(seed) for seed in range(140)]
        assert all(case.expected is not None for case in made)
        return made
    exact = [(case, case.expected()) for case in exact_cases(kernel)]
    return exact * 3 + cases_of(kernel, range(60))


def check(kernel: str, shim) -> None:
    if kernel == "mask":
        for some in cases(kernel):
            check_mask(shim, some)
    elif kernel == "commit":
        for dtype, head, unit in COMMITS:
            for seed in range(4):
                check_commit(shim, dtype, head, unit, seed)
        check_commit_within(shim)
    elif kernel == "draws":
        shim.order = "random"
        check_draws(shim, range(100))
    elif kernel == "filter":
        shim.order = "random"
        check_filter(shim, cases(kernel))
    elif kernel == "topk":
        shim.order = "random"
        check_topk(shim, cases(kernel))
    else:
        check_verification(shim, cases(kernel), ["random"])


@pytest.mark.parametrize(
    "kernel",
    ["greedy", "sampling", "typical", "traversal", "commit", "mask", "draws", "filter", "topk"],
)
def test_without_a_fault_nothing_is_noticed(kernel, shim, tmp_path):
    if kernel not in ("commit", "draws"):
        cases(kernel)
    assert not is_caught(
        mutate(tmp_path, "mask.cu", "// Grid", "// grid"),
        tmp_path,
        functools.partial(check, kernel),
    )


FIRST = {kernel: number for number, (kernel, *_) in reversed([*enumerate(FAULTS)])}


@pytest.mark.parametrize(
    ("kernel", "file", "old", "new"),
    [
        pytest.param(*fault, marks=[] if FIRST[fault[0]] == number else pytest.mark.slow)
        for number, fault in enumerate(FAULTS)
    ],
)
def test_a_fault_is_noticed(kernel, file, old, new, tmp_path):
    if kernel not in ("commit", "draws"):
        cases(kernel)
    assert is_caught(mutate(tmp_path, file, old, new), tmp_path, functools.partial(check, kernel))
