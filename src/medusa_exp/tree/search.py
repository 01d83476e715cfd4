"""Search for the best draft tree of each size, from the ranks at which each head was right.

The ranks_PK of a response say, at each of its P positions, which draft token of head k was
right. With them a decoding run can be replayed for any tree, without the model: exactly in float32;
in lower precision the shape of a step's batch moves logits a little, and now and then a rank. Ranks
of sampled drafts are those of recursive rejection, node by node: decoding takes fewer steps
(`decode/replay.py`).

The reference counts at all positions alike. Decoding does not visit them alike: it jumps over what
is easy, and stands where a run of guesses has just ended, so that such a mean promises more than
comes (seen here: 4.5 tokens a step promised, 3.6 found). So we count where a replay stands.
"""

import heapq
from collections import Counter

import numpy as np

from medusa_exp.tree.tree import RankPath, Tree, chain

_ROUNDS = 3


def prefix_counts(ranks_PK: np.ndarray, max_rank: int) -> Counter[RankPath]:
    """Count at how many positions each path of ranks below `max_rank` came true.

    A path is counted as a whole: the product of its heads' shares would miss that they err
    together.
    """
    counts: Counter[RankPath] = Counter()
    for row in ranks_PK.tolist():
        for depth, rank in enumerate(row, 1):
            if rank >= max_rank:
                break
            counts[tuple(row[:depth])] += 1
    return counts


def grow(value: Counter[RankPath], max_nodes: int, *, is_drawn: bool = False) -> list[RankPath]:
    """Return the best tree's paths in the order in which they are added.

    The first n of them, with the root, are the tree of n + 1 nodes that accepts most guesses at
    the counted positions: a child never counts more than its parent, so taking the most valuable
    node next is optimal. Ties go to the shallower and then to the likelier guess.

    Where ranks are places in a draw (`is_drawn`), a child is tried after its elder siblings, and
    takes them with it: it is added after them.
    """
    if is_drawn:
        return _grow_in_order(value, max_nodes)
    children: dict[RankPath, list[RankPath]] = {}
    for path in value:
        children.setdefault(path[:-1], []).append(path)
    frontier = [(-value[path], len(path), path) for path in children.get((), [])]
    heapq.heapify(frontier)
    paths: list[RankPath] = []
    while frontier and len(paths) < max_nodes - 1:
        _, _, path = heapq.heappop(frontier)
        paths.append(path)
        for child in children.get(path, []):
            heapq.heappush(frontier, (-value[child], len(child), child))
    return paths


def _grow_in_order(value: Counter[RankPath], max_nodes: int) -> list[RankPath]:
    frontier: list[tuple[int, int, RankPath]] = []

    def offer(path: RankPath) -> None:
        if value[path]:
            heapq.heappush(frontier, (-value[path], len(path), path))

    paths: list[RankPath] = []
    offer((0,))
    while frontier and len(paths) < max_nodes - 1:
        _, _, path = heapq.heappop(frontier)
        paths.append(path)
        offer((*path, 0))
        offer((*path[:-1], path[-1] + 1))
    return paths


def replay(ranks_PK: np.ndarray, tree: Tree, found_P: np.ndarray | None = None) -> list[int]:
    """Return the positions at which decoding this answer with this tree would stand.

    At position t token t is certain. The step there accepts the deepest path of the tree that
    came true, adds the backbone's own next token, and the next step stands after them. The first
    token comes with the prompt's step, which is not listed.

    A tree with looked-up nodes has them below the last node of its path that holds what was looked
    up: they come true as far as that does, and nothing else of the tree is as deep then.

    Args:
        ranks_PK: of the answer.
        tree: to decode with.
        found_P: how many of the tokens that are looked up at each position come true; wanted of
            trees that look up (`decode.lookup.count_found`).
    """
    paths = set(tree.paths)
    rows = ranks_PK.tolist()
    positions, t = [], 0
    while t < len(rows) - 1:
        positions.append(t)
        depth = 0
        while depth < len(rows[t]) and tuple(rows[t][: depth + 1]) in paths:
            depth += 1
        if tree.num_lookup and found_P is not None:
            depth = max(depth, min(int(found_P[t]), depth + tree.num_lookup))
        t += depth + 1
    return positions


def num_steps(answers: list[np.ndarray], tree: Tree, found: list[np.ndarray] | None = None) -> int:
    """Count the steps that decoding these answers would take, the prompts' steps included.

    `found` has what `replay` wants of each answer, for trees that look up.
    """
    return sum(1 + len(positions) for positions in _replayed(answers, tree, found))


def _replayed(
    answers: list[np.ndarray], tree: Tree, found: list[np.ndarray] | None
) -> list[list[int]]:
    if found is None:
        return [replay(ranks_PK, tree) for ranks_PK in answers]
    pairs = zip(answers, found, strict=True)
    return [replay(ranks_PK, tree, found_P) for ranks_PK, found_P in pairs]


def best_tree(
    answers: list[np.ndarray], size: int, max_rank: int, *, is_drawn: bool = False
) -> Tree:
    """Return the best tree of at most `size` nodes that a few rounds find.

    Each round counts where the tree of the round before would stand, and grows a new one. Ranks of
    sampled drafts are places in a draw (`is_drawn`).
    """
    chosen = np.concatenate(answers)
    best, fewest = chain(0), num_steps(answers, chain(0))
    for _ in range(_ROUNDS):
        tree = Tree.from_paths(grow(prefix_counts(chosen, max_rank), size, is_drawn=is_drawn))
        steps = num_steps(answers, tree)
        if steps < fewest:
            best, fewest = tree, steps
        chosen = np.concatenate([ranks_PK[replay(ranks_PK, tree)] for ranks_PK in answers])
    return best


def node_shares(
    answers: list[np.ndarray], tree: Tree, found: list[np.ndarray] | None = None
) -> list[float]:
    """Return, for each node of the heads, the share of steps that accept it: 1 for the root.

    `found` is as for `num_steps`.
    """
    positions = _replayed(answers, tree, found)
    visited = np.concatenate([a[stood] for a, stood in zip(answers, positions, strict=True)])
    counts = prefix_counts(visited, max(tree.ranks) + 1)
    return [1.0, *(counts[path] / max(1, len(visited)) for path in tree.paths[1:])]
