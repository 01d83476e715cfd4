"""What is asked of the kernels: by the tests, and of mutants, which must not pass.

B batch, N tree nodes.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from kernel_cases import NEAR, Case, is_borderline, make_case
from kernel_shim import ORDERS, ShimKernels
from tiny_models import build_model
from torch import Tensor

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.cuda.draws import KernelDraw
from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.mask_and_commit import CacheCommit, build_mask
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.sampled import draw
from medusa_exp.decode.verify import Verdict

CONFIGS = (
    LaunchConfig(threads=96),
    LaunchConfig(2, threads=64),
    LaunchConfig(8, threads=32),
    LaunchConfig(threads=32),
    LaunchConfig(4, threads=32),
    LaunchConfig(2, threads=96),
    LaunchConfig(threads=64),
)
COMMITS = ((torch.bfloat16, 16, 16), (torch.float32, 5, 4), (torch.float16, 3, 2))
"""Type and head size of a cache, and the bytes that a thread moves at a time."""


def judged(
    shim: ShimKernels, config: LaunchConfig, case: Case, order: str = "random", seed: int = 0
):
    """Return the kernels' verdict, its tensors copied."""
    shim.order, shim.seed = order, seed
    found = KernelVerify(shim, config)(
        case.logits_BNV, case.tokens_BN, case.parents_BN, rule=case.rule, **case.options
    )
    return Verdict(*(getattr(found, field.name).clone() for field in dataclasses.fields(found)))


def assert_equal(found: Verdict, expected: Verdict) -> None:
    assert found.path_BL.tolist() == expected.path_BL.tolist()
    assert found.num_accepted_B.tolist() == expected.num_accepted_B.tolist()
    assert found.next_token_B.tolist() == expected.next_token_B.tolist()


def cases_of(kernel: str, seeds: range) -> list[tuple[Case, Verdict]]:
    """Return cases and what is expected of them, but for a few that hang on rounding."""
    cases = [make_case(seed, kernel) for seed in seeds]
    clear = [(case, case.expected()) for case in cases if not is_borderline(case)]
    assert len(clear) >= 0.96 * len(cases), f"{len(cases) - len(clear)} of {len(cases)} left out"
    return clear


def check_verification(
    shim: ShimKernels, cases: Iterable[tuple[Case, Verdict]], orders: Iterable[str] = tuple(ORDERS)
) -> None:
    """Fail unless the kernels judge as expected, launched in one way after the other."""
    for number, (case, expected) in enumerate(cases):
        for order in orders:
            assert_equal(
                judged(shim, CONFIGS[number % len(CONFIGS)], case, order, number), expected
            )


@dataclasses.dataclass
class MaskCase:
    """Arguments of `build_mask`, and what it is to write."""

    parents_BN: Tensor
    lengths_B: Tensor
    window: int | None
    mask_B1NK: Tensor
    positions_BN: Tensor


def _random_tree(rng: np.random.Generator, nodes: int) -> Tensor:
    return torch.tensor([-1, *(int(rng.integers(0, n)) for n in range(1, nodes))])


def _ancestors_of(parents_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return ancestors_NN (itself included) and depths_N."""
    ancestors_NN = torch.eye(len(parents_N), dtype=torch.bool)
    for node, parent in enumerate(parents_N.tolist()):
        if parent >= 0:
            ancestors_NN[node] |= ancestors_NN[parent]
    return ancestors_NN, ancestors_NN.sum(1) - 1


def mask_cases(architecture: str, seeds: range) -> list[MaskCase]:
    """Return random trees and lengths; mistral has a sliding window, llama none.

    Some windows are shorter than the trees are deep.
    """
    step_mask = StepMask(build_model(architecture), capacity=200)
    assert (step_mask.window is not None) == (architecture == "mistral")
    window, cases = step_mask.window, []
    for seed in seeds:
        step_mask.window = 3 if window is not None and seed % 3 == 0 else window
        rng = np.random.default_rng(seed)
        nodes, batch = int(rng.integers(2, 40)), int(rng.integers(1, 4))
        trees = [_random_tree(rng, nodes) for _ in range(batch)]
        relations = [_ancestors_of(parents_N) for parents_N in trees]
        depths_BN = torch.stack([depths_N for _, depths_N in relations])
        lengths = rng.integers(1, 30 if seed % 2 else 150, batch).tolist()
        lengths_B = torch.tensor(lengths)
        ancestors_BNN = torch.stack([a for a, _ in relations])
        mask_B1NK = step_mask.at(lengths, ancestors_BNN, depths_BN) == 0  # 0: is seen
        positions_BN = (lengths_B[:, None] + depths_BN).clamp(max=100)
        cases.append(
            MaskCase(torch.stack(trees), lengths_B, step_mask.window, mask_B1NK, positions_BN)
        )
    return cases


def check_mask(shim: Any, cases: list[MaskCase], order: str = "random") -> None:
    """Fail unless the kernel writes the masks and positions of the torch code."""
    shim.order = order
    for seed, case in enumerate(cases):
        shim.seed = seed
        mask_B1NK = torch.zeros_like(case.mask_B1NK, device=shim.device)
        positions_BN = torch.empty_like(case.positions_BN, device=shim.device)
        build_mask(
            shim,
            case.parents_BN.to(shim.device),
            case.lengths_B.to(shim.device),
            torch.tensor(100, device=shim.device),
            mask_B1NK=mask_B1NK,
            positions_BN=positions_BN,
            window=case.window,
        )
        assert mask_B1NK.cpu().equal(case.mask_B1NK)
        assert positions_BN.cpu().equal(case.positions_BN)


def check_draws(shim: Any, seeds: range) -> None:
    """Fail unless the kernel draws the tokens that torch draws in float64."""
    for seed in seeds:
        shim.seed = seed
        rng = np.random.default_rng(seed)
        batch, count = (int(n) for n in rng.integers(1, 4, 2))
        width = int(rng.choice([1, 2, 7, 64, 111, 1000, 5000]))
        number = int(rng.integers(1, 7))
        q_BMW = np.stack(
            [[_a_distribution(rng, width) for _ in range(count)] for _ in range(batch)]
        )
        if is_shared := rng.random() < 0.4:
            q_BMW[:] = q_BMW[:, :1]
        wide = torch.zeros(batch, count, width + int(rng.integers(3)), device=shim.device)
        found = wide[..., :width].copy_(torch.from_numpy(q_BMW))
        q_BMW = found.double().cpu().numpy()
        uniforms = [[_clear_draws(rng, q_W, number) for q_W in q_MW] for q_MW in q_BMW]
        uniforms_BMR = torch.tensor(uniforms, dtype=torch.float32)
        expected_BMR = draw(torch.from_numpy(q_BMW), uniforms_BMR.double())
        if is_shared:
            found = found[:, :1].expand(-1, count, -1)
        tokens_BMR = KernelDraw(shim)(found, uniforms_BMR.to(shim.device)).cpu()
        # Where nothing is left, any token will do.
        has_some_BMR = torch.arange(number) < torch.from_numpy((q_BMW > 0).sum(-1))[..., None]
        assert tokens_BMR[has_some_BMR].equal(expected_BMR[has_some_BMR])
        assert ((tokens_BMR >= 0) & (tokens_BMR < width)).all()


def _a_distribution(rng: np.random.Generator, width: int) -> np.ndarray:
    """Return one that is even, has few tokens, is nearly sure of one, or as it comes."""
    kind = rng.integers(4)
    q_W = np.full(width, 1 / width) if kind == 0 else rng.dirichlet(np.full(width, 0.5))
    if kind == 1:
        q_W[rng.random(width) < 0.9] = 0
    if kind == 2:
        q_W *= 1e-9
        q_W[rng.integers(width)] = 1
    return q_W


def _clear_draws(rng: np.random.Generator, q_W: np.ndarray, number: int) -> list[float]:
    """Return numbers of which each lies well within a token's interval."""
    left_W, uniforms = q_W.copy(), []
    for _ in range(number):
        wide_W = np.where(left_W > 20 * NEAR * left_W.sum(), left_W, 0)
        if not wide_W.sum():
            uniforms.append(0.5)
            continue
        token = int(rng.choice(len(q_W), p=wide_W / wide_W.sum()))
        place = left_W[:token].sum() + left_W[token] * rng.uniform(0.1, 0.9)
        uniforms.append(place / left_W.sum())
        left_W[token] = 0
    return uniforms


def check_commit(shim: Any, dtype: torch.dtype, head: int, unit: int, seed: int) -> None:
    """Fail unless the kernel moves in a cache what `GrowingCache.commit` moves."""
    rng = np.random.default_rng(seed)
    shim.seed = seed
    batch, nodes = int(rng.integers(1, 4)), int(rng.integers(1, 12))
    cache = GrowingCache(num_layers=2, capacity=60, num_rows=batch)
    lengths = rng.integers(1, 30, batch).tolist()
    total = max(lengths) + nodes
    values = torch.Generator().manual_seed(seed)
    for layer in range(2):
        shape = (2, batch, 3, total, head)
        cache.update(*torch.randn(shape, generator=values).to(dtype), layer)
    cache.lengths = lengths
    tensors = [states for layer in cache.layers for states in _states(layer)]
    ours = [states.clone().to(shim.device) for states in tensors]
    paths = [
        [0, *sorted(rng.choice(np.arange(1, nodes), rng.integers(0, nodes), replace=False))]
        for _ in range(batch)
    ]
    width = max(map(len, paths))
    path_BL = torch.tensor([[*map(int, p), *[-1] * (width - len(p))] for p in paths])
    commit = CacheCommit(shim, ours)
    assert commit._defines == (f"UNIT_BYTES={unit}",)
    commit(
        path_BL.to(shim.device),
        torch.tensor([len(path) - 1 for path in paths], device=shim.device),
        torch.full((batch,), max(lengths), device=shim.device),
        torch.tensor(lengths, device=shim.device),
    )
    cache.commit([[int(node) for node in path] for path in paths])
    for mine, states in zip((states.cpu() for states in ours), tensors, strict=True):
        for row, (length, path) in enumerate(zip(lengths, paths, strict=True)):
            kept = length + len(path)
            assert mine[row, :, :kept].equal(states[row, :, :kept])
            assert mine[row, :, total:].equal(states[row, :, total:])


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def check_commit_within(shim: Any) -> None:
    """Fail unless a path that leads out of the cache is followed only within it."""
    before = torch.arange(24.0).reshape(1, 1, 6, 4)
    tensors = [before.clone().to(shim.device) for _ in range(2)]
    given = (torch.tensor(value, device=shim.device) for value in ([[0, 1, 2]], [50], [4], [2]))
    CacheCommit(shim, tensors)(*given)
    assert tensors[0].cpu()[:, :, [2, 3]].equal(before[:, :, [4, 5]])
    assert tensors[0].cpu()[:, :, [0, 1, 4, 5]].equal(before[:, :, [0, 1, 4, 5]])
