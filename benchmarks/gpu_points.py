"""What benchmarks/gpu.py measures: the grid, made-up inputs, and the bytes that must be read.

Nothing here needs a GPU. B batch, N tree nodes, V vocabulary.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.verify import Plan
from medusa_exp.tree import Tree

BATCHES = (1, 4, 8, 16, 32, 64)
VOCABS = (32000, 128256, 151936)
NODES = (16, 64)
RULES = ("greedy", "sampling", "typical")
BANDWIDTH = 3.0e12
"""Bytes a second that floors are stated at: what an H100's memory gives."""


@dataclass(frozen=True)
class Point:
    """One place of the grid."""

    rule: str
    batch: int
    vocab: int
    nodes: int
    itemsize: int = 2


def points() -> list[Point]:
    """Return the grid, in an order that begins with what is asked for most."""
    grid = [
        Point(rule, batch, vocab, nodes)
        for batch, vocab, nodes, rule in itertools.product(BATCHES, VOCABS, NODES, RULES)
    ]
    return sorted(grid, key=lambda p: (p.nodes != 64, p.vocab == 151936))


def tree_of(nodes: int) -> Tree:
    """Return the Medusa authors' tree, or its likeliest nodes by the sum of their ranks."""
    text = (resources.files("medusa_exp.tree") / "medusa_63.json").read_text("utf-8")
    paths = [tuple(path) for path in json.loads(text)["paths"]]
    likeliest = sorted(paths, key=lambda path: (sum(path) + len(path), len(path), path))
    return Tree.from_paths(likeliest[: nodes - 1])


@dataclass
class Inputs:
    """Arguments of `verify`, and how many guesses will come true."""

    logits_BNV: Tensor
    tokens_BN: Tensor
    parents_BN: Tensor
    uniforms_BN: Tensor
    accepted_B: list[int]
    tree: Tree


def make_inputs(point: Point, device: torch.device, seed: int = 0) -> Inputs:
    """Make logits on which a random path of each sequence is accepted for sure."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (point.batch, point.nodes)
    dtype = {2: torch.bfloat16, 4: torch.float32}[point.itemsize]
    logits_BNV = torch.randn(*shape, point.vocab, generator=generator, device=device, dtype=dtype)
    tokens_BN = torch.randint(point.vocab, shape, generator=generator, device=device)
    tree = tree_of(point.nodes)
    for node, parent in enumerate(tree.parents[1:], 1):  # a guess is wrong
        logits_BNV[torch.arange(point.batch), parent, tokens_BN[:, node]] = -30.0
    choice = torch.randint(point.nodes, (point.batch,), generator=torch.manual_seed(seed))
    for row, node in enumerate(choice.tolist()):
        while node > 0:  # but these are right: the guess has nearly all of the probability
            logits_BNV[row, tree.parents[node], tokens_BN[row, node]] = 30.0
            node = tree.parents[node]
    return Inputs(
        logits_BNV,
        tokens_BN,
        torch.tensor([tree.parents], device=device).expand(point.batch, -1),
        torch.rand(shape, generator=generator, device=device),
        [int(tree.depths[node]) for node in choice.tolist()],
        tree,
    )


def forms_of(
    chosen: Plan, shape: tuple[int, int, int], itemsize: int, kernels: Kernels
) -> list[Plan]:
    """Return the layouts worth trying at a shape; the one that would be chosen comes first."""
    batch, _, vocab = shape
    several = max(1, min(16, vocab * itemsize // 16384))
    plans = [
        chosen,
        Plan("two", splits=max(1, min(several, 264 // (22 * batch) or 1))),
        Plan("fused", splits=max(1, min(several, 264 // (22 * batch) or 1))),
        Plan("fused", splits=max(1, several // 2), threads=512),
        Plan("lazy", threads=1024),
    ]
    if kernels.has_clusters:
        plans += [
            Plan("lazy", threads=512, cluster=size) for size in (2, 4, 8) if size * batch <= 264
        ]
    return list(dict.fromkeys(plans))


def floors_us(point: Point, tree: Tree, accepted_B: list[int]) -> dict[str, float]:
    """Return microseconds at `BANDWIDTH` for the rows of a point.

    all: every row. needed: those of nodes with children, and one more a sequence. path: those on
    the accepted path, which a lazy walk reads.
    """
    internal = len(set(tree.parents) - {-1})
    row = point.vocab * point.itemsize / BANDWIDTH * 1e6
    return {
        "all": row * point.nodes * point.batch,
        "needed": row * (internal + 1) * point.batch,
        "path": row * sum(accepted + 1 for accepted in accepted_B),
    }


def figures(
    point: Point, floors: dict[str, float], times_us: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return a point's entry of the JSON: times, fractions of the floors, ratios to the baselines.

    Args:
        point: where.
        floors: of `floors_us`.
        times_us: of each method (ours as form names, baselines as a, b, c), of each way to measure.
    """
    ours = [name for name in times_us if name not in ("a", "b", "c")]
    entry: dict[str, Any] = {**asdict(point), "floors_us": floors, "times_us": times_us}
    if not ours:
        return entry
    best = min(ours, key=lambda name: times_us[name]["graph_cold"])
    time = times_us[best]["graph_cold"]
    entry |= {
        "best_form": best,
        "fraction_of_floor": {name: floor / time for name, floor in floors.items()},
        "times_as_fast_as": {
            name: times_us[name]["eager_cold" if name != "c" else "graph_cold"] / time
            for name in ("a", "b", "c")
            if name in times_us
        },
    }
    return entry
