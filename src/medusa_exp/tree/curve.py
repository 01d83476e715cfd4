"""Ranks of what came true, and times of steps, in; the fastest tree and what it promises, out.

K heads, P positions.
"""

from typing import Any

import numpy as np

from medusa_exp.tree.growth import node_shares, num_steps
from medusa_exp.tree.timing import Timing
from medusa_exp.tree.tree import Tree


def expected_seconds(ranks: list[np.ndarray], tree: Tree | None, timing: Timing) -> float:
    """Return how long these answers should take over a tree, or plainly, each in a full batch."""
    if tree is None:
        steps, step_seconds = sum(map(len, ranks)), timing.plain
    else:
        steps, step_seconds = num_steps(ranks, tree), timing.by_tree[tree]
    later_steps = steps - len(ranks)
    return (len(ranks) * timing.prefill + later_steps * step_seconds) / timing.batch_size


def choose(ranks: list[np.ndarray], timing: Timing) -> dict[str, Any]:
    """Return the curve of one batch size, its fastest tree, and what this promises.

    Args:
        ranks: ranks_PK of each answer.
        timing: of the trees to choose from.
    """
    num_tokens = sum(map(len, ranks))
    curve = [
        {
            "num_nodes": len(tree),
            "tokens_per_step": num_tokens / num_steps(ranks, tree),
            "step_seconds": step_seconds,
            "expected_seconds": expected_seconds(ranks, tree, timing),
            "tokens_per_second": num_tokens / expected_seconds(ranks, tree, timing),
            "tree": tree.to_json(),
        }
        for tree, step_seconds in timing.by_tree.items()
    ]
    entry = {
        "batch_size": timing.batch_size,
        "plain_step_seconds": timing.plain,
        "prefill_seconds": timing.prefill,
        "plain_expected_seconds": expected_seconds(ranks, None, timing),
        "curve": curve,
    }
    _select(entry, by_speed(entry)[0])
    return entry


def by_speed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the points of a curve, the fastest first."""
    return sorted(entry["curve"], key=lambda point: -point["tokens_per_second"])


def _select(entry: dict[str, Any], point: dict[str, Any]) -> None:
    entry |= {
        "num_nodes": point["num_nodes"],
        "tree": point["tree"],
        "predicted_tokens_per_step": point["tokens_per_step"],
        "predicted_speedup": entry["plain_expected_seconds"] / point["expected_seconds"],
    }


def correct(
    entry: dict[str, Any], seconds: dict[Tree | None, float], ranks: list[np.ndarray]
) -> None:
    """Choose anew among the trees that were rehearsed, by what they took rather than should have.

    The rehearsal is of some prompts; what it says about these, in proportion to what was expected
    of these, is carried over to all of them.

    Args:
        entry: of `choose`, for batch size 1.
        seconds: of `rehearse`.
        ranks: ranks_PK of the answers to the rehearsed prompts.
    """
    points = {Tree(**point["tree"]): point for point in entry["curve"]}
    times = {tree: points[tree]["step_seconds"] for tree in seconds if tree is not None}
    timing = Timing(1, times, entry["plain_step_seconds"], entry["prefill_seconds"])
    factor = {tree: took / expected_seconds(ranks, tree, timing) for tree, took in seconds.items()}
    entry["plain_expected_seconds"] *= factor.pop(None)
    for tree, ratio in factor.items():
        point = points[tree]  # type: ignore[index]
        point["expected_seconds"] *= ratio
        point["tokens_per_second"] /= ratio
        point["is_rehearsed"] = True
    _select(entry, min((points[t] for t in factor if t), key=lambda p: p["expected_seconds"]))


def summarise(
    entries: list[dict[str, Any]], ranks: list[np.ndarray], max_rank: int
) -> dict[str, Any]:
    """Return the calibration's record: that of the smallest batch, and all of them in a list."""
    first = entries[0]
    tree = Tree(**first["tree"])
    ranks_PK = np.concatenate(ranks)
    slower = [entry["batch_size"] for entry in entries if entry["predicted_speedup"] <= 1]
    return {
        **first,
        "num_positions": len(ranks_PK),
        "rank_share": [
            [float((ranks_P == rank).mean()) for rank in range(max_rank)] for ranks_P in ranks_PK.T
        ],
        "node_probability": node_shares(ranks, tree),
        "batch_sizes": entries,
        "break_even_batch_size": min(slower, default=None),
    }
