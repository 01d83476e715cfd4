"""Ranks of what came true, and times of steps, in; the fastest tree and what it promises, out.

K heads, P positions.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from medusa_exp.tree.calibration import Calibration, Curve, Point
from medusa_exp.tree.search import node_shares, num_steps
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


def choose(ranks: list[np.ndarray], timing: Timing) -> Curve:
    """Return the curve of one batch size, its fastest tree, and what this promises.

    Args:
        ranks: ranks_PK of each answer.
        timing: of the trees to choose from.
    """
    num_tokens = sum(map(len, ranks))
    points = []
    for tree, step_seconds in timing.by_tree.items():
        seconds = expected_seconds(ranks, tree, timing)
        points.append(
            Point(
                num_nodes=len(tree),
                tokens_per_step=num_tokens / num_steps(ranks, tree),
                step_seconds=step_seconds,
                expected_seconds=seconds,
                tokens_per_second=num_tokens / seconds,
                tree=tree,
            )
        )
    plain_seconds = expected_seconds(ranks, None, timing)
    return Curve(
        batch_size=timing.batch_size,
        plain_step_seconds=timing.plain,
        prefill_seconds=timing.prefill,
        plain_expected_seconds=plain_seconds,
        curve=points,
        **_chosen(points, plain_seconds),
    )


def _chosen(points: list[Point], plain_seconds: float) -> dict[str, Any]:
    """Return the fields of a `Curve` that say which of some points is the fastest."""
    point = min(points, key=lambda point: point.expected_seconds)
    return {
        "num_nodes": point.num_nodes,
        "tree": point.tree,
        "predicted_tokens_per_step": point.tokens_per_step,
        "predicted_speedup": plain_seconds / point.expected_seconds,
    }


def correct(curve: Curve, seconds: dict[Tree | None, float], ranks: list[np.ndarray]) -> Curve:
    """Choose anew among the trees that were rehearsed, by what they took rather than should have.

    The rehearsal is of some prompts; what it says about these, in proportion to what was expected
    of these, is carried over to all of them.

    Args:
        curve: of `choose`, for batch size 1.
        seconds: of `rehearse`.
        ranks: ranks_PK of the answers to the rehearsed prompts.
    """
    times = {point.tree: point.step_seconds for point in curve.curve}
    timing = Timing(1, times, curve.plain_step_seconds, curve.prefill_seconds)
    factor = {tree: took / expected_seconds(ranks, tree, timing) for tree, took in seconds.items()}
    points = [
        _slowed(point, factor[point.tree]) if point.tree in factor else point
        for point in curve.curve
    ]
    plain_seconds = curve.plain_expected_seconds * factor[None]
    rehearsed = [point for point in points if point.is_rehearsed]
    return replace(
        curve,
        plain_expected_seconds=plain_seconds,
        curve=points,
        **_chosen(rehearsed, plain_seconds),
    )


def _slowed(point: Point, factor: float) -> Point:
    return replace(
        point,
        expected_seconds=point.expected_seconds * factor,
        tokens_per_second=point.tokens_per_second / factor,
        is_rehearsed=True,
    )


def summarise(
    curves: list[Curve],
    ranks: list[np.ndarray],
    max_rank: int,
    *,
    choices: Tree,
    heads_sha256: str,
) -> Calibration:
    """Return the calibration's record.

    Args:
        curves: from the smallest batch on.
        ranks: ranks_PK of each answer.
        max_rank: what a guess that is not among the first ones has.
        choices: see `Calibration`.
        heads_sha256: see `Calibration`.
    """
    ranks_PK = np.concatenate(ranks)
    slower = [curve.batch_size for curve in curves if curve.predicted_speedup <= 1]
    return Calibration(
        **vars(curves[0]),
        num_positions=len(ranks_PK),
        rank_share=[
            [float((ranks_P == rank).mean()) for rank in range(max_rank)] for ranks_P in ranks_PK.T
        ],
        node_probability=node_shares(ranks, curves[0].tree),
        batch_sizes=curves,
        break_even_batch_size=min(slower, default=None),
        choices=choices,
        heads_sha256=heads_sha256,
    )
