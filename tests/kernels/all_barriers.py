"""Every barrier of every kernel removed in turn: `nox -s mutations`, some ten minutes.

A barrier whose absence nobody notices is listed here with the reason, or the run fails.
"""

import functools
import re

import pytest
from kernel_cases import RULES, exact_cases, is_borderline, make_case
from kernel_checks import PLANS, cases_of, check_mask, check_verification, mask_cases
from kernel_mutants import is_caught
from kernel_shim import GXX, SOURCES

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++")

BARRIER = re.compile(r"(?:__syncthreads|cluster_sync<CLUSTER>|__threadfence)\(\);")
SURVIVORS: dict[tuple[str, str], str] = {}
"""(file, the line and the next) -> why it goes unnoticed."""


def barriers() -> list[tuple[str, int, str]]:
    """Return (file, number among its barriers, what stands there and behind it)."""
    found = []
    for path in sorted(SOURCES.glob("*.cu*")):
        text = path.read_text("utf-8")
        for number, match in enumerate(BARRIER.finditer(text)):
            behind = text[match.start() :].split("\n", 2)[:2]
            found.append((path.name, number, " / ".join(line.strip() for line in behind)))
    return found


@functools.cache
def cases(rule: str):
    exact = [(case, case.expected()) for case in exact_cases(rule)]
    large = [make_case(seed, rule, vocab=64, nodes=40) for seed in range(2 * len(PLANS))]
    return (
        exact * 3
        + cases_of(rule, range(200))
        + [(case, case.expected()) for case in large if not is_borderline(case)]
    )


def check(kernel: str, shim) -> None:
    if kernel == "mask":
        check_mask(shim, mask_cases("mistral", range(30)))
    else:
        check_verification(shim, cases(kernel), ["random", "reverse"])


@pytest.mark.parametrize("kernel", [*RULES, "mask"])
def test_with_all_barriers_nothing_is_noticed(kernel, shim):
    check(kernel, shim)


@pytest.mark.parametrize(("file", "number", "place"), barriers())
def test_a_missing_barrier_is_noticed(file, number, place, tmp_path):
    for rule in RULES:
        cases(rule)
    kernels = {"mask.cu": ["mask"]}.get(file) or [r for r in RULES if file in (f"{r}.cu",)] or RULES
    is_noticed = False
    for kernel in kernels:
        folder = tmp_path / kernel
        folder.mkdir()
        sources = folder / "sources"
        sources.mkdir()
        for path in SOURCES.glob("*.cu*"):
            text = path.read_text("utf-8")
            if path.name == file:
                match = list(BARRIER.finditer(text))[number]
                text = text[: match.start()] + text[match.end() :]
            (sources / path.name).write_text(text, "utf-8")
        is_noticed |= is_caught(sources, folder, functools.partial(check, kernel))
        if is_noticed:
            break
    assert is_noticed != ((file, place) in SURVIVORS), (file, place)
