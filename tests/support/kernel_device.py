"""Checks of the kernels on a GPU: against the specification, and against the CPU shim.

The cases are those of the kernels' other tests, with all their oddities. tests/kernels/test_gpu.py
asserts what is found; benchmarks/gpu/run.py writes it down.
"""

import dataclasses
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from filter_cases import check_filter, clear_filter_cases, exact_filter_cases
from kernel_cases import KERNELS, Case, changed, exact_cases, is_borderline, make_case
from kernel_checks import (
    COMMITS,
    check_commit,
    check_commit_within,
    check_draws,
    check_mask,
    mask_cases,
)
from kernel_shim import GXX, ShimKernels
from topk_cases import check_topk, exact_topk_cases, topk_case

from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.verify import Verdict


def configs_of(kernels: Kernels) -> list[LaunchConfig]:
    """Return launches of the sizes that are used on a device, and a small one."""
    sizes = (1, 2, 4, 8) if kernels.has_clusters else (1,)
    return [
        LaunchConfig(1, 1024),
        LaunchConfig(1, 128),
        *(LaunchConfig(size, 512) for size in sizes),
    ]


def moved(case: Case, device: torch.device) -> Case:
    """Return a case with its tensors, and their strides, on a device."""

    def there(value: torch.Tensor) -> torch.Tensor:
        copy = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value)

    return changed(case, there)


def compare_verification(kernels: Kernels, num_cases: int) -> dict[str, Any]:
    """Compare every launch of every kernel; return what was counted, mismatches by name."""
    counted: Counter[str] = Counter()
    mismatches: list[str] = []
    configs = configs_of(kernels)
    with tempfile.TemporaryDirectory() as folder:
        shim = KernelVerify(ShimKernels(Path(folder)), LaunchConfig(threads=64)) if GXX else None
        for kernel in KERNELS:
            cases = [*exact_cases(kernel), *(make_case(seed, kernel) for seed in range(num_cases))]
            for number, case in enumerate(cases):
                is_near = number >= len(exact_cases(kernel)) and is_borderline(case)
                counted["borderline"] += is_near
                expected = case.expected()
                there = moved(case, kernels.device)
                for config in configs:
                    found = _judged(KernelVerify(kernels, config), there)
                    counted["compared"] += not is_near
                    if not is_near and found != _told(expected):
                        mismatches.append(f"{kernel} {number} {config}")
                if shim is not None and number % 5 == 0:
                    counted["compared_with_shim"] += 1
                    if _judged(shim, case) != _judged(KernelVerify(kernels, configs[0]), there):
                        mismatches.append(f"shim {kernel} {number}")
    return {
        **counted,
        "mismatches": mismatches,
        "shim": "compared" if GXX else "left out: there is no g++",
    }


def compare_small(kernels: Kernels) -> list[str]:
    """Judge a case of each kernel with each launch, for a sanitizer; return the mismatches."""
    mismatches = []
    for kernel in KERNELS:
        some = (make_case(seed, kernel, vocab=1000, nodes=9) for seed in itertools.count())
        case = next(case for case in some if not is_borderline(case))
        there = moved(case, kernels.device)
        for config in configs_of(kernels):
            if _judged(KernelVerify(kernels, config), there) != _told(case.expected()):
                mismatches.append(f"{kernel} {config}")
    return mismatches


def compare_step(kernels: Kernels) -> str:
    """Compare the other kernels with the torch code; "equal", or what differs."""
    try:
        for architecture in ("llama", "mistral"):
            check_mask(kernels, mask_cases(architecture, range(20)))
        for dtype, head, unit in COMMITS:
            for seed in range(10):
                check_commit(kernels, dtype, head, unit, seed)
        check_commit_within(kernels)
        check_draws(kernels, range(60))
        check_filter(kernels, [*exact_filter_cases(), *clear_filter_cases(range(60))])
        check_topk(kernels, [*exact_topk_cases(), *map(topk_case, range(140))])
    except AssertionError as error:
        return f"differs: {error!r}"
    return "equal"


def _judged(verifier: KernelVerify, case: Case) -> tuple[Any, ...]:
    return _told(
        verifier(case.logits_BNV, case.tokens_BN, case.parents_BN, rule=case.rule, **case.options)
    )


def _told(verdict: Verdict) -> tuple[Any, ...]:
    return tuple(getattr(verdict, field.name).tolist() for field in dataclasses.fields(verdict))
