"""Logits to be filtered by top-k and top-p, and what is asked of the kernel that does it.

B batch, N places, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from kernel_cases import DTYPES, some_logits, strided
from torch import Tensor

from medusa_exp.decode.cuda.filter import KernelFilter
from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.distribution import probabilities

FILTERS = ((20, None), (None, 0.9), (20, 0.8), (1, None), (None, 1e-15), (5, 0.3), (300, 0.999))
ROW_CONFIGS = (
    LaunchConfig(threads=96),
    LaunchConfig(2, threads=64),
    LaunchConfig(8, threads=32),
    LaunchConfig(threads=32),
    LaunchConfig(4, threads=32),
    LaunchConfig(threads=1024),
    LaunchConfig(2, threads=512),
)
"""Launches of kernels that read rows. Seven, for the made-up cases come in threes."""
_NEAR = 1e-6
"""Relative distance at which float32 and float64 may cut a row differently."""


@dataclass
class FilterCase:
    """Arguments of `KernelFilter`, and the distributions that are left, in float64."""

    logits_BNV: Tensor
    temperature: float
    top_k: int | None
    top_p: float | None

    @cached_property
    def expected(self) -> Tensor:
        """What the specification says."""
        return self._expected(1.0)

    def _expected(self, factor: float) -> Tensor:
        """Return what it says of top_p times a factor."""
        top_p = None if self.top_p is None else min(self.top_p * factor, 1 - 1e-15)
        return probabilities(self.logits_BNV.double(), self.temperature, self.top_k, top_p)

    def hangs_on_a_digit(self) -> bool:
        """Would a top_p that is a little smaller or larger leave other tokens?"""
        return not torch.equal(self._expected(1 - _NEAR) > 0, self._expected(1 + _NEAR) > 0)


def filter_case(seed: int, vocab: int | None = None) -> FilterCase:
    """Return a case; the same seed gives the same."""
    rng = np.random.default_rng(seed)
    vocab = vocab or int(rng.choice([1, 2, 7, 8, 64, 111, 257, 1000, 5000]))
    batch, count = (int(n) for n in rng.integers(1, 3, 2))
    logits = np.stack([some_logits(rng, count, vocab) for _ in range(batch)])
    logits_BNV = torch.from_numpy(logits).to(DTYPES[seed % 3])
    temperature = float(rng.choice([0.1, 0.3, 0.7, 1.0, 2.0]))
    filters = FILTERS[int(rng.integers(len(FILTERS)))]
    return FilterCase(strided(rng, logits_BNV), temperature, *filters)


def exact_filter_cases() -> list[FilterCase]:
    """Return cases that are cut exactly where a sum reaches top_p, between tokens that tie."""
    cases = [
        FilterCase(torch.zeros(1, 1, vocab, dtype=dtype), 1.0, top_k, eighths / 8)
        for dtype in DTYPES
        for vocab in (8, 512)
        for eighths in (1, 3, 7)
        for top_k in (None, 3)
    ]
    halves_V = torch.tensor([-0.0, -torch.inf, torch.nan, 0.0, torch.inf, 1.0, torch.inf])
    for cut in (slice(None), slice(4), slice(1, 3)):  # two infinities; two zeros; nothing
        for top_p in (0.25, 0.5, 0.75):
            cases.append(FilterCase(halves_V[cut][None, None].clone(), 1.0, None, top_p))
    # Counted together, as they are far from the largest, and told apart by all of their bits.
    far_V = torch.tensor([60.0, torch.nan, -0.1, -0.3, torch.nan, -0.2, -0.4])
    cases += [FilterCase(far_V.to(d)[None, None], 1.0, k, None) for d in DTYPES for k in (3, 6)]
    fifths_V = torch.full((1, 1, 300), -torch.inf)
    fifths_V[..., [3, 290, 40, 170]] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    temperature = 1 / np.log(2)  # p of 2/5, and 1/5 of three
    return cases + [FilterCase(fifths_V, temperature, None, p) for p in (0.3, 0.5, 0.7, 0.9)]


def check_filter(kernels: Any, cases: Iterable[FilterCase]) -> None:
    """Fail unless the kernel leaves what is expected, launched in one way after the other."""
    for number, case in enumerate(cases):
        kernels.seed = number
        config = ROW_CONFIGS[number % len(ROW_CONFIGS)]
        found_BNV = KernelFilter(kernels, config)(
            case.logits_BNV.to(kernels.device), case.temperature, case.top_k, case.top_p
        ).cpu()
        expected_BNV = case.expected
        left_BNV = probabilities(found_BNV.double(), case.temperature)
        assert (left_BNV - expected_BNV).abs().max() < 1e-9, case
        assert (left_BNV > 0).equal(expected_BNV > 0), case
        is_left_BNV = (expected_BNV > 0) & ~case.logits_BNV.isnan()  # as they were
        assert found_BNV[is_left_BNV].equal(case.logits_BNV[is_left_BNV]), case


@cache
def clear_filter_cases(seeds: range) -> list[FilterCase]:
    """Return cases, but for some that hang on rounding, as of a thousand equal logits 0.9 does."""
    cases = [filter_case(seed) for seed in seeds]
    clear = [case for case in cases if not case.hangs_on_a_digit()]
    assert len(clear) > 0.9 * len(cases), f"{len(cases) - len(clear)} of {len(cases)} left out"
    return clear
