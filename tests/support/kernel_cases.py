"""Made-up batches of trees and logits, from a seed: ordinary, and such as kernels stumble over.

B batch, N tree nodes, V vocabulary.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.sampled import LEAST_DRAWN, Drawn
from medusa_exp.decode.verify import Verdict, verify

KERNELS = ("greedy", "sampling", "typical", "traversal")
"""Files of kernels; the last is rule sampling of drafts that were drawn."""
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

    kernel: str
    logits_BNV: Tensor
    tokens_BN: Tensor
    parents_BN: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The rule that the kernel applies."""
        return "sampling" if self.kernel == "traversal" else self.kernel

    def expected(self) -> Verdict:
        """Return what the specification says, in float64."""
        options = dict(self.options)
        if "uniforms_BN" in options:
            options["uniforms_BN"] = options["uniforms_BN"].double()
        if "drawn" in options:
            options["drawn"] = replace(options["drawn"], q_BQW=options["drawn"].q_BQW.double())
        return verify(
            self.logits_BNV.double(), self.tokens_BN, self.parents_BN, rule=self.rule, **options
        )


def make_case(seed: int, kernel: str, vocab: int | None = None, nodes: int | None = None) -> Case:
    """Return a case; the same seed gives the same."""
    rng = np.random.default_rng([seed, KERNELS.index(kernel)])
    vocab = vocab or int(rng.choice(VOCABS))
    nodes = nodes or int(rng.choice([2, 3, 5, 9, 17, 40], p=[0.1, 0.2, 0.3, 0.2, 0.15, 0.05]))
    shape = str(rng.choice(SHAPES))
    nodes = 1 if shape == "single" else nodes
    batch = int(rng.integers(1, 4))
    parents = np.stack([_parents(rng, shape, nodes) for _ in range(batch)])
    if kernel == "traversal":
        parents[:] = parents[0]
    logits = np.stack([some_logits(rng, nodes, vocab) for _ in range(batch)])
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    logits_BNV = strided(rng, torch.from_numpy(logits).to(dtype))
    options: dict[str, Any] = {}
    if kernel != "greedy":
        options["temperature"] = float(rng.choice([0.3, 0.7, 1.0, 2.0]))
    if kernel == "typical":
        options |= {
            "epsilon": float(rng.choice([0.09, 0.3])),
            "alpha": float(rng.choice([0.3, 0.6])),
        }
    p_BNV = probabilities(logits_BNV.double(), options.get("temperature", 1.0)).numpy()
    if kernel == "traversal":
        tokens, options["drawn"] = _draws(rng, p_BNV, parents[0])
        options["uniforms_BN"] = torch.zeros(batch, nodes + int(rng.integers(3)))
    else:
        tokens = np.stack([_tokens(rng, p_BNV[b], parents[b]) for b in range(batch)])
    if kernel == "sampling":
        uniforms = [_uniforms(rng, p_BNV[b], parents[b], tokens[b]) for b in range(batch)]
        options["uniforms_BN"] = torch.tensor(np.stack(uniforms), dtype=torch.float32)
    if rng.random() < 0.5:
        options["max_depth"] = max(_depth(row) for row in parents)
    trees = torch.from_numpy(tokens), torch.from_numpy(parents)
    case = Case(kernel, logits_BNV, *trees, options)
    for _ in range(5 if kernel == "traversal" else 0):  # until they lie well within
        uniforms = rng.random(options["uniforms_BN"].shape)
        options["uniforms_BN"] = torch.tensor(uniforms, dtype=torch.float32)
        if not hangs_on_a_digit(case):
            break
    return case


def cases_alike(kernel: str, number: int) -> list[Case]:
    """Return cases that one captured call can take: of one shape, type and set of numbers."""

    def kind(case: Case) -> tuple[Any, ...]:
        options = dict(case.options)
        options.pop("uniforms_BN", None)
        drawn = options.pop("drawn", None)
        tree = drawn and (drawn.q_BQW.shape, drawn.q_index, drawn.token_map is None)
        return case.logits_BNV.shape, case.logits_BNV.dtype, options, tree

    made = (make_case(seed, kernel, vocab=1000, nodes=9) for seed in itertools.count())
    clear = (case for case in made if not is_borderline(case) and "max_depth" not in case.options)
    first = next(case for case in clear if case.logits_BNV.shape[:2] == (2, 9))
    if kernel == "traversal":  # trees with distributions of one shape do not come by chance
        others = (_other_draws(first, seed) for seed in itertools.count())
        clear = (case for case in others if not is_borderline(case))
    return [first, *itertools.islice((c for c in clear if kind(c) == kind(first)), number - 1)]


def _other_draws(case: Case, seed: int) -> Case:
    """Return a case whose rows have changed places, with other numbers."""
    uniforms_BN = torch.rand(case.options["uniforms_BN"].shape, generator=torch.manual_seed(seed))
    drawn = replace(case.options["drawn"], q_BQW=case.options["drawn"].q_BQW.flip(0))
    return replace(
        case,
        logits_BNV=case.logits_BNV.flip(0),
        tokens_BN=case.tokens_BN.flip(0),
        options=case.options | {"uniforms_BN": uniforms_BN, "drawn": drawn},
    )


def changed(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """Return a case whose tensors over rows are changed: moved to a device, or repeated."""
    options = dict(case.options)
    if "uniforms_BN" in options:
        options["uniforms_BN"] = change(options["uniforms_BN"])
    if "drawn" in options:
        options["drawn"] = replace(options["drawn"], q_BQW=change(options["drawn"].q_BQW))
    return replace(
        case,
        logits_BNV=change(case.logits_BNV),
        tokens_BN=change(case.tokens_BN),
        parents_BN=change(case.parents_BN),
        options=options,
    )


def exact_cases(kernel: str) -> list[Case]:
    """Return cases that stand exactly on an edge, where `<` and `<=` differ."""
    logits_BNV = torch.zeros(1, 4, 8)
    parents_BN = torch.tensor([[-1, 0, 0, 2]])
    tokens_BN = torch.tensor([[0, 5, 3, 0]])
    if kernel == "traversal":
        return _exact_draws(parents_BN, tokens_BN)
    if kernel == "greedy":
        return [Case(kernel, logits_BNV, tokens_BN, parents_BN)]
    if kernel == "typical":
        halves_BNV = torch.full((1, 4, 300), -torch.inf)
        halves_BNV[..., [3, 5]] = 0.0
        return [  # p = 1/2 of both tokens; then of three tokens, epsilon the larger
            Case(kernel, halves_BNV, tokens_BN, parents_BN, {"epsilon": epsilon, "alpha": 2.0})
            for epsilon in (0.5, 0.4)
        ]
    edges = [
        Case(kernel, logits_BNV, tokens_BN, parents_BN, {"uniforms_BN": torch.full((1, 4), u / 8)})
        for u in range(8)
    ]
    several = [  # tokens to a thread
        Case(
            kernel,
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


def _exact_draws(parents_BN: Tensor, tokens_BN: Tensor) -> list[Case]:
    """Return p of 1/8 each, weights of 1/4, 1 and 1/2, and a rest of four tokens of 1/8."""
    q_BQW = torch.tensor([[[1, 2, 2, 1, 2, 8, 0, 0], [4, 4, 4, 4, 0, 0, 0, 0]]]) / 16
    children = ((1, 2), (), (3,), ())
    cases = []
    for place in range(4):
        for kept in ((), (1,), (3,)):  # of those that stand on the edge, the one that lies below
            uniforms_BN = torch.tensor([[place / 4, 1 / 4, 0.9, 1 / 2]])
            uniforms_BN[:, kept] -= 2**-20
            for token_map in (None, torch.arange(8)):
                drawn = Drawn(q_BQW, (0, 0, 1, 0), children, token_map)
                options = {"uniforms_BN": uniforms_BN, "drawn": drawn}
                cases.append(
                    Case("traversal", torch.zeros(1, 4, 8), tokens_BN, parents_BN, options)
                )
    cases += _cases_of_two_failures()
    for seed in range(6):
        case = _last_token_case(seed)
        q_BQW = torch.zeros(1, 1, 500).index_fill(2, torch.tensor(60), 1.0)
        options = {**case.options, "drawn": Drawn(q_BQW, (0, 0), ((1,), ()))}
        cases.append(Case("traversal", case.logits_BNV, case.tokens_BN, case.parents_BN, options))
    return cases


def _cases_of_two_failures() -> list[Case]:
    """Return a node of weight 1/2 that is kept with 1/5 once both its children, or its only one,
    have failed; and a root whose second child is a copy of the first."""
    logits_BNV, of_root = torch.zeros(1, 4, 8), [1, 1, 1, 1, 4, 8, 0, 0]
    q_BQW = torch.tensor([[[4, 4, 4, 0, 0, 4, 0, 0], [1, 1, 1, 8, 4, 1, 0, 0], of_root]]) / 16
    tokens_BN, parents_BN = torch.tensor([[0, 5, 3, 4]]), torch.tensor([[-1, 0, 1, 1]])
    drawn = Drawn(q_BQW, (0, 1, 0, 0), ((1,), (2, 3), (), ()))
    options = {"uniforms_BN": torch.tensor([[0.3, 0.1, 0.9, 0.9]]), "drawn": drawn}
    cases = [Case("traversal", logits_BNV, tokens_BN, parents_BN, options)]
    alone = Drawn(q_BQW, (0, 1, 0, 0), ((1,), (2,), (), ()))
    options = {"uniforms_BN": torch.tensor([[0.3, 0.25, 0.9, 0.9]]), "drawn": alone}
    of_one_BN = torch.tensor([[-1, 0, 1, -1]])
    cases.append(Case("traversal", logits_BNV, tokens_BN, of_one_BN, options))
    twice = Drawn(q_BQW, (2, 0, 0, 0), ((1, 2), (), (), ()))
    options = {"uniforms_BN": torch.tensor([[0.3, 0.9, 0.9, 0.9]]), "drawn": twice}
    tokens_BN, parents_BN = torch.tensor([[0, 5, 5, 0]]), torch.tensor([[-1, 0, 0, -1]])
    return [*cases, Case("traversal", logits_BNV, tokens_BN, parents_BN, options)]


def _draws(
    rng: np.random.Generator, p_BNV: np.ndarray, parents: np.ndarray
) -> tuple[np.ndarray, Drawn]:
    """Guess as heads do that are drawn from: of all tokens or some, by node or by depth; few of
    them may have a probability, so that draws behind these are nonsense."""
    batch, nodes, vocab = p_BNV.shape
    token_map = None
    if rng.random() < 0.4:
        token_map = rng.permutation(vocab)[: int(rng.integers(1, vocab + 1))]
    children = tuple(tuple(np.flatnonzero(parents == node).tolist()) for node in range(nodes))
    is_by_depth = rng.random() < 0.4
    depths = [_depth_of(parents, node) for node in range(nodes)]
    groups = sorted({depths[n] if is_by_depth else n for n in range(nodes) if children[n]})
    q_index = [0] * nodes
    for node in range(nodes):
        if children[node]:
            q_index[node] = groups.index(depths[node] if is_by_depth else node)
    own = slice(None) if token_map is None else token_map
    width = vocab if token_map is None else len(token_map)
    q_BQW = np.zeros((batch, max(len(groups), 1), width))
    for b, q in itertools.product(range(batch), range(q_BQW.shape[1])):
        alike = p_BNV[b, rng.choice([n for n in range(nodes) if q_index[n] == q])][own]
        q_BQW[b, q] = _near(rng, alike)
    q_BQW = q_BQW.astype(np.float32)
    tokens = rng.integers(0, vocab, (batch, nodes))
    for b, node in itertools.product(range(batch), range(nodes)):
        left = q_BQW[b, q_index[node]].astype(np.float64)
        for elders, child in enumerate(children[node]):
            chance = rng.random()
            if left.sum() > 0 and chance < 0.9:
                place = rng.choice(width, p=left / left.sum())
                tokens[b, child] = place if token_map is None else token_map[place]
                left[place] = 0
            elif elders and chance < 0.95:
                tokens[b, child] = tokens[b, children[node][int(rng.integers(elders))]]
    drawn = Drawn(
        strided(rng, torch.from_numpy(q_BQW)),
        tuple(q_index),
        children,
        None if token_map is None else torch.from_numpy(token_map),
    )
    return tokens, drawn


def _near(rng: np.random.Generator, p_W: np.ndarray) -> np.ndarray:
    """Return a distribution that is p with errors, or p, or something else."""
    kind, width = rng.random(), len(p_W)
    q_W = p_W * np.exp(rng.normal(0, rng.choice([0.3, 1.0, 3.0]), width))
    if kind < 0.15:
        q_W = p_W.copy()
    elif kind < 0.35:
        q_W = rng.dirichlet(np.full(width, 0.3))
    if rng.random() < 0.2:
        q_W[rng.random(width) < 0.8] = 0
    q_W = np.where(q_W > LEAST_DRAWN, q_W, 0.0)
    return q_W / q_W.sum() if q_W.sum() > 0 else np.full(width, 1 / width)


def _depth_of(parents: np.ndarray, node: int) -> int:
    depth = 0
    while parents[node] >= 0:
        node, depth = parents[node], depth + 1
    return depth


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


def some_logits(rng: np.random.Generator, nodes: int, vocab: int) -> np.ndarray:
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


def strided(rng: np.random.Generator, logits_BNV: Tensor) -> Tensor:
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
    """Say whether acceptance, typical or of draws, hangs on the last digits of a float32."""
    if case.kernel == "traversal":
        return hangs_on_a_digit(case)
    if case.kernel != "typical":
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


def hangs_on_a_digit(case: Case) -> bool:
    """Numbers a little smaller or larger, or float32 throughout, change what is specified."""
    uniforms_BN = case.options["uniforms_BN"]
    told = case.expected()
    for step in (-NEAR, NEAR):
        options = case.options | {"uniforms_BN": (uniforms_BN + step).clamp(0, 1 - NEAR / 2)}
        if _differ(replace(case, options=options).expected(), told):
            return True
    narrow = verify(
        case.logits_BNV.float(), case.tokens_BN, case.parents_BN, rule=case.rule, **case.options
    )
    return _differ(narrow, told)


def _differ(one: Verdict, other: Verdict) -> bool:
    return not all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("path_BL", "num_accepted_B", "next_token_B")
    )


def _has_near_tie(paths: list[tuple[float, ...]]) -> bool:
    """Two of the longest paths score the same but for rounding, and not by being the same sum."""
    longest = [path for path in paths if len(path) == max(map(len, paths))]
    sums = sorted(longest, key=sum)
    return any(
        abs(sum(a) - sum(b)) < NEAR * max(1.0, abs(sum(a))) and len({*a, *b}) > 1 and a != b
        for a, b in itertools.pairwise(sums)
    )
