"""Whether the kernels are right on a device: against the specification, and against the CPU shim.

The cases are those of the kernels' tests, with all their oddities.
"""

import dataclasses
import itertools
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_cases import RULES, Case, exact_cases, is_borderline, make_case
from kernel_checks import COMMITS, check_commit, check_commit_within, check_mask, mask_cases
from kernel_shim import GXX, ShimKernels

from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.verify import KernelVerify, Plan
from medusa_exp.decode.verify import Verdict


def plans_of(kernels: Kernels) -> list[Plan]:
    """Return a layout for each form, of the sizes that are used on a device."""
    plans = [
        Plan("two", splits=3, threads=256, walk_threads=1024),
        Plan("two", splits=32, threads=128, walk_threads=256),
        Plan("fused", splits=4, threads=256),
        Plan("fused", splits=1, threads=512),
        Plan("lazy", threads=1024),
    ]
    if kernels.has_clusters:
        plans += [Plan("lazy", threads=512, cluster=size) for size in (2, 4, 8)]
    return plans


def moved(case: Case, device: torch.device) -> Case:
    """Return a case with its tensors, and their strides, on a device."""

    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        copy = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value)

    changed = {field.name: there(getattr(case, field.name)) for field in dataclasses.fields(case)}
    changed["options"] = {name: there(value) for name, value in case.options.items()}
    return Case(**changed)


def check_verification(kernels: Kernels, num_cases: int) -> dict[str, Any]:
    """Compare every form of every rule; return what was counted, mismatches by name."""
    counted: Counter[str] = Counter()
    mismatches: list[str] = []
    plans = plans_of(kernels)
    with tempfile.TemporaryDirectory() as folder:
        shim = KernelVerify(ShimKernels(Path(folder)), Plan("lazy", threads=64)) if GXX else None
        for rule in RULES:
            cases = [*exact_cases(rule), *(make_case(seed, rule) for seed in range(num_cases))]
            for number, case in enumerate(cases):
                is_near = number >= len(exact_cases(rule)) and is_borderline(case)
                counted["borderline"] += is_near
                expected = case.expected()
                there = moved(case, kernels.device)
                for plan in plans:
                    found = _judged(KernelVerify(kernels, plan), there)
                    counted["compared"] += not is_near
                    if not is_near and found != _told(expected):
                        mismatches.append(f"{rule} {number} {plan}")
                if shim is not None and number % 5 == 0:
                    counted["compared_with_shim"] += 1
                    if _judged(shim, case) != _judged(KernelVerify(kernels, plans[0]), there):
                        mismatches.append(f"shim {rule} {number}")
    return {
        **counted,
        "mismatches": mismatches,
        "shim": "compared" if GXX else "left out: there is no g++",
    }


def check_small(kernels: Kernels) -> list[str]:
    """Judge a case of each rule in each form, for a sanitizer; return the mismatches."""
    mismatches = []
    for rule in RULES:
        some = (make_case(seed, rule, vocab=1000, nodes=9) for seed in itertools.count())
        case = next(case for case in some if not is_borderline(case))
        there = moved(case, kernels.device)
        for plan in plans_of(kernels):
            if _judged(KernelVerify(kernels, plan), there) != _told(case.expected()):
                mismatches.append(f"{rule} {plan}")
    return mismatches


def check_step(kernels: Kernels) -> str:
    """Compare the mask and the commit with the torch code; return "equal" or what differs."""
    try:
        for architecture in ("llama", "mistral"):
            check_mask(kernels, mask_cases(architecture, range(20)))
        for dtype, head, unit in COMMITS:
            for seed in range(10):
                check_commit(kernels, dtype, head, unit, seed)
        check_commit_within(kernels)
    except AssertionError as error:
        return f"differs: {error!r}"
    return "equal"


def _judged(verifier: KernelVerify, case: Case) -> tuple[Any, ...]:
    return _told(
        verifier(case.logits_BNV, case.tokens_BN, case.parents_BN, rule=case.rule, **case.options)
    )


def _told(verdict: Verdict) -> tuple[Any, ...]:
    return tuple(getattr(verdict, field.name).tolist() for field in dataclasses.fields(verdict))
