"""Logits to draft the likeliest tokens of, and what is asked of the kernel that does it.

B batch, M rows of a sequence, W tokens that heads can propose, R ranks, N nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from filter_cases import ROW_CONFIGS
from kernel_cases import DTYPES, some_logits, strided
from torch import Tensor

from medusa_exp.decode.cuda.topk import MAX_RANKS, KernelTopK

_UNTOUCHED = -7


@dataclass
class TopKCase:
    """Arguments of `KernelTopK`."""

    logits_BMW: Tensor
    places_N: Tensor
    num_ranks: int
    token_map: Tensor | None

    @cached_property
    def expected(self) -> Tensor:
        """Tokens_BN: of those that tie, the first in a row comes first."""
        inf = torch.inf
        known_BMW = self.logits_BMW.double().nan_to_num(nan=-inf, posinf=inf, neginf=-inf)
        sorted_BMW = known_BMW.sort(dim=-1, descending=True, stable=True).indices
        found_BF = sorted_BMW[..., : self.num_ranks].flatten(1)
        if self.token_map is not None:
            found_BF = self.token_map[found_BF]
        found_BN = found_BF[:, self.places_N.clamp(min=0)]
        return found_BN.where(self.places_N >= 0, _UNTOUCHED)


def topk_case(seed: int, width: int | None = None) -> TopKCase:
    """Return a case; the same seed gives the same."""
    rng = np.random.default_rng(seed)
    width = width or int(rng.choice([1, 2, 7, 8, 33, 111, 257, 1000, 5000]))
    batch, count = (int(n) for n in rng.integers(1, 4, 2))
    logits = np.stack([some_logits(rng, count, width) for _ in range(batch)])
    if rng.random() < 0.3:  # the best stand side by side, in one slice
        logits.sort(-1)
    logits_BMW = strided(rng, torch.from_numpy(logits).to(DTYPES[seed % 3]))
    num_ranks = min(int(rng.choice([1, 2, 5, 10, MAX_RANKS])), width)
    places = rng.permutation(count * num_ranks)
    places = np.concatenate([[-1], places, rng.integers(-1, count * num_ranks, 3)])
    names = torch.from_numpy(rng.permutation(3 * width)[:width]) if rng.random() < 0.5 else None
    return TopKCase(logits_BMW, torch.from_numpy(places), num_ranks, names)


def exact_topk_cases() -> list[TopKCase]:
    """Return cases of the smallest numbers, of zeros of both signs, and of nothing."""
    rows = [
        [1e-40, 2e-40, -1e-40, 0.0, -0.0, 3e-40],
        [-0.0, 0.0, -0.0, 0.0, torch.nan, -torch.inf],
        [torch.nan, -torch.inf, torch.nan, -torch.inf, torch.inf, torch.inf],
        [torch.nan] * 6,
        [-1.0, -2.0, -3.0, -1e-40, -torch.inf, -0.5],
    ]
    logits_BMW = torch.tensor(rows)[:, None].repeat(1, 1, 40)
    places_N = torch.arange(-1, 20)
    return [TopKCase(logits_BMW.to(dtype), places_N, 20, None) for dtype in DTYPES]


def check_topk(kernels: Any, cases: Iterable[TopKCase]) -> None:
    """Fail unless the kernel finds what is expected, launched in one way after the other."""
    for number, case in enumerate(cases):
        kernels.seed = number
        config = ROW_CONFIGS[number % len(ROW_CONFIGS)]
        there = kernels.device
        logits_BMW = torch.empty_strided(
            case.logits_BMW.size(),
            case.logits_BMW.stride(),
            dtype=case.logits_BMW.dtype,
            device=there,
        ).copy_(case.logits_BMW)
        shape = len(logits_BMW), len(case.places_N)
        tokens_BN = torch.full(shape, _UNTOUCHED, device=there)
        KernelTopK(kernels, config)(
            tokens_BN,
            logits_BMW,
            case.places_N.to(there),
            case.num_ranks,
            None if case.token_map is None else case.token_map.to(there),
        )
        assert tokens_BN.tolist() == case.expected.tolist(), (number, config, case)
