"""Every barrier of every kernel removed in turn, which must be noticed: `nox -s mutations`."""

import functools
import re
from pathlib import Path

import pytest
from filter_cases import check_filter, clear_filter_cases, exact_filter_cases
from kernel_cases import KERNELS, Case, exact_cases, is_borderline, make_case
from kernel_checks import (
    CONFIGS,
    cases_of,
    check_draws,
    check_mask,
    check_verification,
    mask_cases,
)
from kernel_mutants import is_caught
from kernel_shim import GXX, SOURCES
from topk_cases import check_topk, exact_topk_cases, topk_case

from medusa_exp.decode.verify import Verdict

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")

BARRIER = re.compile(r"(?:__syncthreads|cluster_sync<CLUSTER>)\(\);")
DEVICE_ONLY = re.compile(r"#ifndef CUDA_SHIM\n.*?\n#endif\n#endif\n", re.DOTALL)
"""In rows.cuh: barriers in PTX, for which the shim has its own."""
OTHERS = ("mask", "draws", "filter", "topk")
TIMEOUT = 900


def barriers() -> list[tuple[str, int, str]]:
    """Return (file, place in the text, the line from there on)."""
    found = []
    for path in sorted(SOURCES.glob("*.cu*")):
        text = path.read_text("utf-8")
        hidden = [match.span() for match in DEVICE_ONLY.finditer(text)]
        for match in BARRIER.finditer(text):
            if not any(start <= match.start() < end for start, end in hidden):
                line = text[match.start() :].split("\n")[0].rstrip("\\ ")
                found.append((path.name, match.start(), line))
    return found


@functools.cache
def cases(kernel: str) -> list[tuple[Case, Verdict]]:
    exact = [(case, case.expected()) for case in exact_cases(kernel)]
    large = [make_case(seed, kernel, vocab=64, nodes=40) for seed in range(2 * len(CONFIGS))]
    clear = [(case, case.expected()) for case in large if not is_borderline(case)]
    return exact * 3 + clear + cases_of(kernel, range(150))


def check(kernel: str, shim) -> None:
    if kernel == "mask":
        check_mask(shim, mask_cases("mistral", range(30)))
    elif kernel == "draws":
        shim.order = "random"
        check_draws(shim, range(300))
    elif kernel == "filter":
        shim.order = "random"
        check_filter(shim, exact_filter_cases() * 3 + clear_filter_cases(range(150)))
    elif kernel == "topk":
        shim.order = "random"
        check_topk(shim, exact_topk_cases() * 7 + [topk_case(seed) for seed in range(250)])
    else:
        check_verification(shim, cases(kernel), ["random"])


def without(file: str, place: int, folder: Path) -> Path:
    """Return a copy of the sources without the barrier."""
    folder.mkdir()
    for path in SOURCES.glob("*.cu*"):
        text = path.read_text("utf-8")
        if path.name == file:
            gap = BARRIER.match(text, place)
            assert gap is not None
            text = text[:place] + text[gap.end() :]
        (folder / path.name).write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize("kernel", [*KERNELS, *OTHERS])
def test_with_all_barriers_nothing_is_noticed(kernel, shim):
    check(kernel, shim)


@pytest.mark.parametrize(("file", "place", "line"), barriers())
def test_a_missing_barrier_is_noticed(file, place, line, tmp_path):
    kernels = [kernel for kernel in (*KERNELS, *OTHERS) if file == f"{kernel}.cu"] or [
        *("sampling", "greedy", "typical", "traversal")
    ]
    for kernel in set(kernels) - {*OTHERS}:
        cases(kernel)
    is_noticed = False
    for kernel in kernels:
        folder = tmp_path / kernel
        folder.mkdir()
        sources = without(file, place, folder / "sources")
        is_noticed = is_caught(sources, folder, functools.partial(check, kernel), TIMEOUT)
        if is_noticed:
            break
    assert is_noticed, line
