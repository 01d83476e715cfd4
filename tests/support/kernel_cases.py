"""Made-up batches of trees and logits, from a seed: ordinary, and such as kernels stumble over.

B batch, N tree nodes, V vocabulary.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.verify import Verdict, verify

RULES = ("greedy", "sampling", "typical")
SHAPES = ("random", "random", "bushy", "chain", "star", "single", "padded")
LOGITS = (
    "normal",
    "normal",
    "peaked",
    "ties",
    "equal",
    "minus_inf",
    "only_minus_inf",
    "nan",
    "inf",
)
VOCABS = (1, 2, 7, 8, 64, 111, 111, 257, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEAR = 1e-5
"""Relative distance at which float32 and float64 may decide differently."""


@dataclass
class Case:
    """Arguments of `verify`."""

    rule: str
    logits_BNV: Tensor
    tokens_BN: Tensor
    parents_BN: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def expected(self) -> Verdict:
        """Return what the specification says, in float64."""
        options = dict(self.options)
        if "uniforms_BN" in options:
            options["uniforms_BN"] = options["uniforms_BN"].double()
        return verify(
            self.logits_BNV.double(), self.tokens_BN, self.parents_BN, rule=self.rule, **options
        )


def make_case(seed: int, rule: str, vocab: int | None = None, nodes: int | None = None) -> Case:
    """Return a case; the same seed gives the same."""
    rng = np.random.default_rng([seed, RULES.index(rule)])
    vocab = vocab or int(rng.choice(VOCABS))
    nodes = nodes or int(rng.choice([2, 3, 5, 9, 17, 40], p=[0.1, 0.2, 0.3, 0.2, 0.15, 0.05]))
    shape = str(rng.choice(SHAPES))
    nodes = 1 if shape == "single" else nodes
    batch = int(rng.integers(1, 4))
    parents = np.stack([_parents(rng, shape, nodes) for _ in range(batch)])
    logits = np.stack([_logits(rng, nodes, vocab) for _ in range(batch)])
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    logits_BNV = _strided(rng, torch.from_numpy(logits).to(dtype))
    options: dict[str, Any] = {}
    if rule != "greedy":
        options["temperature"] = float(rng.choice([0.3, 0.7, 1.0, 2.0]))
    if rule == "typical":
        options |= {
            "epsilon": float(rng.choice([0.09, 0.3])),
            "alpha": float(rng.choice([0.3, 0.6])),
        }
    p_BNV = probabilities(logits_BNV.double(), options.get("temperature", 1.0)).numpy()
    tokens = np.stack([_tokens(rng, p_BNV[b], parents[b]) for b in range(batch)])
    if rule == "sampling":
        uniforms = [_uniforms(rng, p_BNV[b], parents[b], tokens[b]) for b in range(batch)]
        options["uniforms_BN"] = torch.tensor(np.stack(uniforms), dtype=torch.float32)
    if rng.random() < 0.5:
        options["max_depth"] = max(_depth(row) for row in parents)
    return Case(rule, logits_BNV, torch.from_numpy(tokens), torch.from_numpy(parents), options)


def cases_alike(rule: str, number: int) -> list[Case]:
    """Return cases that one captured call can take: of one shape, type and set of numbers."""

    def kind(case: Case) -> tuple[Any, ...]:
        numbers = {name: value for name, value in case.options.items() if name != "uniforms_BN"}
        return case.logits_BNV.shape, case.logits_BNV.dtype, numbers

    made = (make_case(seed, rule, vocab=1000, nodes=9) for seed in itertools.count())
    clear = (case for case in made if not is_borderline(case) and "max_depth" not in case.options)
    first = next(case for case in clear if case.logits_BNV.shape[:2] == (2, 9))
    return [first, *itertools.islice((c for c in clear if kind(c) == kind(first)), number - 1)]


def exact_cases(rule: str) -> list[Case]:
    """Return cases that stand exactly on an edge, where `<` and `<=` differ."""
    logits_BNV = torch.zeros(1, 4, 8)
    parents_BN = torch.tensor([[-1, 0, 0, 2]])
    tokens_BN = torch.tensor([[0, 5, 3, 0]])
    if rule == "greedy":
        return [Case(rule, logits_BNV, tokens_BN, parents_BN)]
    if rule == "typical":
        halves_BNV = torch.full((1, 4, 300), -torch.inf)
        halves_BNV[..., [3, 5]] = 0.0
        return [  # p = 1/2 of both tokens; then of three tokens, epsilon the larger
            Case(rule, halves_BNV, tokens_BN, parents_BN, {"epsilon": epsilon, "alpha": 2.0})
            for epsilon in (0.5, 0.4)
        ]
    edges = [
        Case(rule, logits_BNV, tokens_BN, parents_BN, {"uniforms_BN": torch.full((1, 4), u / 8)})
        for u in range(8)
    ]
    several = [  # tokens to a thread
        Case(
            rule,
            torch.zeros(1, 4, 256),
            tokens_BN,
            parents_BN,
            {"uniforms_BN": torch.full((1, 4), u / 256)},
        )
        for u in range(10, 256, 21)
    ]
    return edges + several + [_last_token_case(seed) for seed in range(12)]


def _last_token_case(seed: int) -> Case:
    """Return a draw so near to 1 that rounding may leave no token for it but the last."""
    logits_BNV = torch.full((1, 2, 500), -torch.inf)
    generator = torch.Generator().manual_seed(seed)
    logits_BNV[..., 40:300:20] = torch.randn(13, generator=generator)
    uniforms_BN = torch.full((1, 2), 1 - 2**-24)
    tokens_BN, parents_BN = torch.tensor([[0, 60]]), torch.tensor([[-1, 0]])
    return Case("sampling", logits_BNV, tokens_BN, parents_BN, {"uniforms_BN": uniforms_BN})


def _parents(rng: np.random.Generator, shape: str, nodes: int) -> np.ndarray:
    parents = np.full(nodes, -1, dtype=np.int64)
    for node in range(1, nodes):
        oldest = {"chain": node - 1, "star": 0, "bushy": max(0, node - 4)}.get(shape, 0)
        youngest = 0 if shape == "star" else node - 1
        parents[node] = rng.integers(oldest, youngest + 1)
    if shape == "padded":
        parents[max(1, nodes // 2) :] = -1
    return parents


def _depth(parents: np.ndarray) -> int:
    depths = np.zeros(len(parents), dtype=int)
    for node, parent in enumerate(parents):
        depths[node] = depths[parent] + 1 if parent >= 0 else 0
    return int(depths.max())


def _logits(rng: np.random.Generator, nodes: int, vocab: int) -> np.ndarray:
    kind = str(rng.choice(LOGITS))
    logits = rng.normal(0, 8 if kind == "peaked" else 2, (nodes, vocab))
    logits += rng.choice([0.0, 30.0, -30.0])
    is_odd = rng.random((nodes, vocab)) < rng.choice([0.02, 0.5])
    if kind == "ties":
        return np.round(rng.normal(0, 1, (nodes, vocab)))
    if kind == "equal":
        return np.repeat(rng.normal(0, 1, (nodes, 1)), vocab, axis=1)
    if kind == "minus_inf":
        logits[is_odd] = -np.inf
    if kind == "only_minus_inf":
        logits[rng.random(nodes) < 0.6] = -np.inf
    if kind == "nan":
        logits[is_odd] = np.nan
    if kind == "inf":
        logits[is_odd] = np.inf
    return logits


def _strided(rng: np.random.Generator, logits_BNV: Tensor) -> Tensor:
    """Lay the same logits out so that rows begin at odd places, or sequences stand side by side."""
    batch, nodes, vocab = logits_BNV.shape
    kind = rng.integers(3)
    if kind == 0:
        return logits_BNV.contiguous()
    if kind == 1:
        wide = torch.full((batch, nodes, vocab + int(rng.integers(1, 9))), 99.0).to(logits_BNV)
        start = int(rng.integers(0, wide.shape[2] - vocab + 1))
        view = wide[:, :, start : start + vocab]
    else:
        view = torch.full((nodes, batch, vocab), 99.0).to(logits_BNV).transpose(0, 1)
    view.copy_(logits_BNV)
    return view


def _tokens(rng: np.random.Generator, p_NV: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Guess as heads do: mostly what is likely after the parent; siblings may repeat."""
    nodes, vocab = p_NV.shape
    tokens = rng.integers(0, vocab, nodes)
    for node in range(1, nodes):
        chance = rng.random()
        if chance < 0.4:
            tokens[node] = p_NV[parents[node]].argmax()
        elif chance < 0.8:
            tokens[node] = rng.choice(vocab, p=p_NV[parents[node]])
    return tokens


def _uniforms(
    rng: np.random.Generator, p_NV: np.ndarray, parents: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Draw numbers that lie well within the interval of some token, or exactly 0."""
    uniforms = np.empty(len(parents))
    for node, p_V in enumerate(p_NV):
        first = list(dict.fromkeys(tokens[parents == node])) if node >= 0 else []
        order = np.concatenate([first, np.setdiff1d(np.arange(len(p_V)), first)]).astype(int)
        ends = np.cumsum(p_V[order])
        wide = np.where(p_V[order] > 20 * NEAR, p_V[order], 0.0)
        if len({*p_V}) == 1 and len(p_V).bit_count() == 1:  # edges that floats hit exactly
            uniforms[node] = rng.integers(len(p_V)) / len(p_V)
        elif rng.random() < 0.1 and not ((p_V > 0) & (p_V < 1e-30)).any():
            uniforms[node] = 0.0
        elif wide.sum() == 0:
            uniforms[node] = 0.5
        else:
            place = rng.choice(len(order), p=wide / wide.sum())
            uniforms[node] = ends[place] - p_V[order[place]] * rng.uniform(0.1, 0.9)
    return uniforms


def is_borderline(case: Case) -> bool:
    """Say whether typical acceptance hangs on the last digits of a float32."""
    if case.rule != "typical":
        return False
    temperature = case.options["temperature"]
    epsilon, alpha = case.options["epsilon"], case.options["alpha"]
    p_BNV = probabilities(case.logits_BNV.double(), temperature)
    threshold_BN = (alpha * (-torch.special.entr(p_BNV).sum(-1)).exp()).clamp(max=epsilon)
    for b, parents in enumerate(case.parents_BN.tolist()):
        logs: list[tuple[float, ...] | None] = []
        for node, parent in enumerate(parents):
            if parent < 0:
                logs.append(() if node == 0 else None)
                continue
            p = float(p_BNV[b, parent, case.tokens_BN[b, node]])
            threshold = float(threshold_BN[b, parent])
            if abs(p - threshold) <= NEAR * threshold:
                return True
            above = logs[parent]
            logs.append((*above, float(np.log(p))) if above is not None and p > threshold else None)
        if _has_near_tie([log for log in logs if log]):
            return True
    return False


def _has_near_tie(paths: list[tuple[float, ...]]) -> bool:
    """Two of the longest paths score the same but for rounding, and not by being the same sum."""
    longest = [path for path in paths if len(path) == max(map(len, paths))]
    sums = sorted(longest, key=sum)
    return any(
        abs(sum(a) - sum(b)) < NEAR * max(1.0, abs(sum(a))) and len({*a, *b}) > 1 and a != b
        for a, b in itertools.pairwise(sums)
    )
