"""The grid of verification: its points, made-up inputs, and the bytes that must be read.

Nothing here needs a GPU. B batch, N tree nodes, V vocabulary.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.cuda.launch import LaunchConfig
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.sampled import Drawn, children_of
from medusa_exp.tree import Tree

BATCHES = (1, 4, 8, 16, 32, 64)
VOCABS = (32000, 128256, 151936)
NODES = (16, 64)
RULES = ("greedy", "sampling", "typical")
KERNELS = (*RULES, "traversal")
"""The last is rule sampling of drafts that were drawn."""
RIVALS = ("eager", "compiled", "split")
"""See rivals/verification.py."""
BANDWIDTH = 3.0e12
"""Bytes a second that floors are stated at: what an H100's memory gives."""


@dataclass(frozen=True)
class Point:
    """One place of the grid."""

    rule: str
    """One of KERNELS."""
    batch: int
    vocab: int
    nodes: int
    itemsize: int = 2


def points() -> list[Point]:
    """Return the grid, in an order that begins with what is asked for most."""
    grid = [
        Point(kernel, batch, vocab, nodes)
        for batch, vocab, nodes, kernel in itertools.product(BATCHES, VOCABS, NODES, KERNELS)
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
    """Arguments of `verify`, and how many draft tokens will be accepted."""

    logits_BNV: Tensor
    tokens_BN: Tensor
    parents_BN: Tensor
    uniforms_BN: Tensor
    accepted_B: list[int]
    tree: Tree
    drawn: Drawn | None = None
    """Of traversal, distributions of random heads: one at each depth."""


def make_inputs(point: Point, device: torch.device, seed: int = 0) -> Inputs:
    """Make logits on which a random path of each sequence is accepted for sure."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (point.batch, point.nodes)
    dtype = {2: torch.bfloat16, 4: torch.float32}[point.itemsize]
    logits_BNV = torch.randn(*shape, point.vocab, generator=generator, device=device, dtype=dtype)
    tokens_BN = torch.randint(point.vocab, shape, generator=generator, device=device)
    tree = tree_of(point.nodes)
    for node, parent in enumerate(tree.parents[1:], 1):  # a draft token is wrong
        logits_BNV[torch.arange(point.batch), parent, tokens_BN[:, node]] = -30.0
    choice = torch.randint(point.nodes, (point.batch,), generator=torch.manual_seed(seed))
    for row, node in enumerate(choice.tolist()):
        while node > 0:  # but these are right: the token has nearly all of the probability
            logits_BNV[row, tree.parents[node], tokens_BN[row, node]] = 30.0
            node = tree.parents[node]
    drawn = None
    if point.rule == "traversal":
        shape_of_q = (point.batch, tree.depth, point.vocab)
        q_BQW = torch.randn(shape_of_q, generator=generator, device=device).softmax(-1)
        q_index = [min(int(depth), tree.depth - 1) for depth in tree.depths]
        drawn = Drawn(q_BQW, tuple(q_index), children_of(tree))
    return Inputs(
        logits_BNV,
        tokens_BN,
        torch.tensor([tree.parents], device=device).expand(point.batch, -1),
        torch.rand(shape, generator=generator, device=device),
        [int(tree.depths[node]) for node in choice.tolist()],
        tree,
        drawn,
    )


def configs_of(chosen: LaunchConfig, kernels: Kernels) -> list[LaunchConfig]:
    """Return the launches worth trying; the one that would be chosen comes first."""
    sizes = (1, 2, 4, 8) if kernels.has_clusters else (1,)
    tried = [LaunchConfig(size, threads) for size in sizes for threads in (512, 1024)]
    return list(dict.fromkeys([chosen, *tried]))


def name_of(config: LaunchConfig) -> str:
    """Return what a launch is called in the JSON."""
    return f"{config.cluster} x {config.threads}"


def floors_us(point: Point, tree: Tree, accepted_B: list[int]) -> dict[str, float]:
    """Return microseconds at `BANDWIDTH` for the rows of a point.

    all: every row. needed: those of nodes with children, and one more a sequence. path: those on
    the accepted path, which a walk reads (traversal reads those of other nodes that it tries, too).
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
    """Return a point's entry of the JSON: times, fractions of the floors, ratios to the rivals.

    Args:
        point: where.
        floors: of `floors_us`.
        times_us: of each method (a launch by `name_of`, or one of RIVALS), of each way to measure.
    """
    ours = [name for name in times_us if name not in RIVALS]
    entry: dict[str, Any] = {**asdict(point), "floors_us": floors, "times_us": times_us}
    if not ours:
        return entry
    best = min(ours, key=lambda name: times_us[name]["graph_cold"])
    time = times_us[best]["graph_cold"]
    entry |= {
        "best_config": best,
        "fraction_of_floor": {name: floor / time for name, floor in floors.items()},
        "times_as_fast_as": {
            name: times_us[name]["graph_cold" if name == "split" else "eager_cold"] / time
            for name in RIVALS
            if name in times_us
        },
    }
    return entry
