"""Calibration: from ranks of accepted tokens and step times to the fastest tree at each batch size.

`choose` holds trees against each other, `Calibration` is what calibration.json holds, and
`choose_tree` says which tree a run decodes with. K heads, P positions.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from medusa_exp.config import DecodeConfig, TreeConfig
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, sha256_file, write_json
from medusa_exp.tree.search import node_shares, num_steps
from medusa_exp.tree.tree import Tree, chain

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"


@dataclass
class Timing:
    """Median seconds of a step of `batch_size` rows: over each tree, plain, and the prompts'."""

    batch_size: int
    by_tree: dict[Tree, float]
    plain: float
    prefill: float


def without_dips(timing: Timing) -> Timing:
    """Return the times with which no step over more nodes is faster than one over fewer.

    More nodes are more work; on a machine that does other things as well, steps of five can seem to
    take longer than steps of six, and all larger trees are then judged by an accident. Times that
    contradict the order give way to their mean (isotonic regression, by pooling of adjacent
    violators: Ayer et al., 1955). A node that is looked up costs less than one of heads that draft
    in turn: in order are trees with as many of them.
    """
    by_tree = dict(timing.by_tree)
    for number in {tree.num_lookup for tree in by_tree}:
        alike = {tree: time for tree, time in timing.by_tree.items() if tree.num_lookup == number}
        by_tree |= _rising(alike)
    return replace(timing, by_tree=by_tree)


def _rising(times: dict[Tree, float]) -> dict[Tree, float]:
    trees = sorted(times, key=lambda tree: tree.num_checked)
    pools: list[tuple[float, int]] = []  # seconds of all, and how many
    for tree in trees:
        seconds, number = times[tree], 1
        while pools and pools[-1][0] / pools[-1][1] > seconds / number:
            others, of_them = pools.pop()
            seconds, number = seconds + others, number + of_them
        pools.append((seconds, number))
    means = [seconds / number for seconds, number in pools for _ in range(number)]
    return dict(zip(trees, means, strict=True))


@dataclass(frozen=True)
class Point:
    """A tree, and what answering the calibration's prompts over it takes."""

    num_nodes: int
    tokens_per_step: float
    step_seconds: float
    """As `without_dips` leaves it."""
    expected_seconds: float
    """Seconds of all held-out responses together, each in a full batch."""
    tokens_per_second: float
    tree: Tree
    is_rehearsed: bool = False
    """Do the seconds come from whole answers? Else from steps alone; `correct` has made them
    comparable."""


@dataclass(frozen=True)
class Curve:
    """The trees that were timed at one batch size, and the fastest of them."""

    batch_size: int
    plain_step_seconds: float
    prefill_seconds: float
    plain_expected_seconds: float
    curve: list[Point]
    """Trees of the heads alone; with as many looked-up nodes as tree.lookup says, if it does."""
    num_nodes: int
    """Nodes of the chosen tree, which the fields below describe."""
    tree: Tree
    predicted_tokens_per_step: float
    predicted_speedup: float
    draft: str = field(default="top", kw_only=True)
    """What the trees are filled with: the heads' likeliest tokens, or draws (decode.draft)."""
    tokens_per_second: dict[str, float] = field(default_factory=dict, kw_only=True)
    """Of the best tree of each kind of draft that was tried."""
    with_lookup: list[Point] = field(default_factory=list, kw_only=True)
    """Trees to which looked-up nodes were added (tree.lookup=null)."""
    untimed: list[Tree] = field(default_factory=list, kw_only=True)
    """Larger trees than those of the curve, over which a step takes longer than it can save."""

    def fastest(self) -> list[Point]:
        """Return all points, the fastest first."""
        return sorted([*self.curve, *self.with_lookup], key=lambda point: -point.tokens_per_second)

    def promising(self, number: int) -> list[Tree]:
        """Return so many trees that may be the fastest: that which should be comes first.

        Then those of the next smaller and the next larger size, then others by their speed: steps
        of neighbours take nearly the same, and a busy machine puts them in any order.
        """
        points = self.fastest()
        alike = [point for point in points if point.tree.num_lookup == points[0].tree.num_lookup]
        alike.sort(key=lambda point: point.num_nodes)
        place = alike.index(points[0])
        beside = alike[max(place - 1, 0) : place + 2]
        trees = dict.fromkeys(point.tree for point in [points[0], *beside, *points])
        return list(trees)[:number]

    def without_lookup(self) -> Tree:
        """Return the fastest tree of the heads alone: of those that were rehearsed, if any was."""
        if not self.tree.num_lookup:
            return self.tree
        points = [point for point in self.curve if point.is_rehearsed] or self.curve
        return max(points, key=lambda point: point.tokens_per_second).tree

    def up_to(self, num_nodes: int) -> Tree:
        """Return the largest tree of at most so many nodes; looked-up ones come on top of them.

        Raises:
            UserError: none is as small.
        """
        trees = [*(point.tree for point in self.curve), *self.untimed]
        fitting = [tree for tree in trees if len(tree) <= num_nodes]
        if not fitting:
            raise UserError(
                f"tree.num_nodes={num_nodes}: {CALIBRATION} has no tree as small: run stage "
                "calibrate again."
            )
        return max(fitting, key=len)


@dataclass(frozen=True)
class Calibration(Curve):
    """All curves; at its own level that of the smallest batch."""

    num_positions: int
    rank_share: list[list[float]]
    """[head][rank]: how often that guess came true."""
    node_probability: list[float]
    """How often a step accepts each node of the tree."""
    batch_sizes: list[Curve]
    """From the smallest batch on."""
    break_even_batch_size: int | None
    """The smallest at which no tree is faster than plain decoding."""
    choices: Tree
    """The largest tree that was grown: what tree=dynamic picks from."""
    heads_sha256: str
    drawn_by: dict[str, float | None] | None = field(default=None, kw_only=True)
    """Temperature, top_k and top_p of the responses; None where they are greedy."""

    def of_batch_size(self, batch_size: int) -> Curve:
        """Return what was found for the next size at or below this one, else for the smallest."""
        below = [curve for curve in self.batch_sizes if curve.batch_size <= batch_size]
        return below[-1] if below else self.batch_sizes[0]


def heads_sha256(out: Path) -> str:
    """Name the heads of a run, to know what a calibration was made with.

    Raises:
        UserError: there are none.
    """
    if not (weights := out / "heads" / "model.safetensors").is_file():
        raise UserError(f"{weights} is no file: restore it, or run stage train first.")
    return sha256_file(weights)


def save_calibration(calibration: Calibration, out: Path) -> None:
    """Write it into a run directory."""
    write_json(out / CALIBRATION, asdict(calibration))


def load_calibration(out: Path) -> Calibration:
    """Read a run's calibration.

    Raises:
        UserError: there is none, or it is of other heads or of another version.
    """
    path = out / CALIBRATION
    found = read_json(path)
    if found is None:
        raise UserError(f"{path} does not exist: run stage calibrate, or set tree=chain.")
    if found.get("heads_sha256") != heads_sha256(out):
        raise UserError(
            f"{path} was measured with other heads than those in {out / 'heads'}: run stage "
            "calibrate again, or set tree=chain."
        )
    try:
        return msgspec.convert(found, Calibration)
    except ValueError as error:  # msgspec's, or text that is none of Unicode
        raise UserError(
            f"{path} is damaged or of another version ({error}): run stage calibrate again."
        ) from error


def expected_seconds(
    ranks: list[np.ndarray],
    tree: Tree | None,
    timing: Timing,
    found: list[np.ndarray] | None = None,
) -> float:
    """Return how long these answers should take over a tree, or plainly, each in a full batch."""
    if tree is None:
        steps, step_seconds = sum(map(len, ranks)), timing.plain
    else:
        steps, step_seconds = num_steps(ranks, tree, found), timing.by_tree[tree]
    later_steps = steps - len(ranks)
    return (len(ranks) * timing.prefill + later_steps * step_seconds) / timing.batch_size


def choose(ranks: list[np.ndarray], timing: Timing, found: list[np.ndarray] | None = None) -> Curve:
    """Return the curve of one batch size, its fastest tree, and what this promises.

    `ranks` are ranks_PK of each answer, `found` found_P; the trees to choose from are those that
    were timed.
    """
    num_tokens = sum(map(len, ranks))
    points = [
        Point(
            num_nodes=tree.num_checked,
            tokens_per_step=num_tokens / num_steps(ranks, tree, found),
            step_seconds=step_seconds,
            expected_seconds=(seconds := expected_seconds(ranks, tree, timing, found)),
            tokens_per_second=num_tokens / seconds,
            tree=tree,
        )
        for tree, step_seconds in timing.by_tree.items()
    ]
    plain_seconds = expected_seconds(ranks, None, timing)
    with_lookup = [point for point in points if point.tree.num_lookup]
    if len(with_lookup) == len(points):  # as tree.lookup wants it
        with_lookup = []
    return Curve(
        batch_size=timing.batch_size,
        plain_step_seconds=timing.plain,
        prefill_seconds=timing.prefill,
        plain_expected_seconds=plain_seconds,
        curve=[point for point in points if point not in with_lookup],
        with_lookup=with_lookup,
        **_chosen(points, plain_seconds),
    )


def _chosen(points: list[Point], plain_seconds: float) -> dict[str, Any]:
    """Return the fields of a `Curve` that say which of some points is the fastest."""
    point = min(points, key=lambda point: point.expected_seconds)
    speedup = plain_seconds / point.expected_seconds
    if point.num_nodes == 1:  # plain decoding too: what it gains on that is noise of the clock
        speedup = min(1.0, speedup)
    return {
        "num_nodes": point.num_nodes,
        "tree": point.tree,
        "predicted_tokens_per_step": point.tokens_per_step,
        "predicted_speedup": speedup,
    }


def correct(
    curve: Curve,
    seconds: dict[Tree | None, float],
    ranks: list[np.ndarray],
    found: list[np.ndarray] | None = None,
) -> Curve:
    """Choose anew among the trees that were rehearsed, by what they took rather than should have.

    The rehearsal is of some prompts; what it says about these, in proportion to what was expected
    of these, is carried over to all of them. Other trees are corrected by the median proportion of
    those that were rehearsed: steps alone are timed warm, over one prompt, so that all trees seem
    faster than whole answers are. Plain decoding's proportion says less of them: it drafts nothing.

    `curve` is that of `choose` for batch size 1, `seconds` those of `rehearse`, and `ranks` and
    `found` are of the answers to the rehearsed prompts.
    """
    times = {point.tree: point.step_seconds for point in curve.fastest()}
    timing = Timing(1, times, curve.plain_step_seconds, curve.prefill_seconds)
    factor = {
        tree: took / expected_seconds(ranks, tree, timing, found) for tree, took in seconds.items()
    }
    of_others = median(value for tree, value in factor.items() if tree is not None)
    by_tree = {
        point.tree: replace(
            point,
            expected_seconds=point.expected_seconds * factor.get(point.tree, of_others),
            tokens_per_second=point.tokens_per_second / factor.get(point.tree, of_others),
            is_rehearsed=point.tree in factor,
        )
        for point in curve.fastest()
    }
    plain_seconds = curve.plain_expected_seconds * factor[None]
    return replace(
        curve,
        plain_expected_seconds=plain_seconds,
        curve=[by_tree[point.tree] for point in curve.curve],
        with_lookup=[by_tree[point.tree] for point in curve.with_lookup],
        **_chosen([point for point in by_tree.values() if point.is_rehearsed], plain_seconds),
    )


def without_vain_lookup(curve: Curve) -> Curve:
    """Return the curve with one node chosen where looked-up ones cost more than they save.

    That is plain decoding, so that nothing is promised. As many looked-up nodes as tree.lookup says
    are kept.
    """
    if not curve.tree.num_lookup or not curve.with_lookup or curve.predicted_speedup >= 1:
        return curve
    smallest = min(curve.curve, key=lambda point: point.num_nodes)
    return replace(curve, **_chosen([smallest], curve.plain_expected_seconds))


def faster(curves: list[Curve]) -> Curve:
    """Return the faster of the curves of one batch size, each of another kind of draft."""
    by_draft = {
        curve.draft: max(
            point.tokens_per_second for point in curve.fastest() if point.tree == curve.tree
        )
        for curve in curves
    }
    best = max(curves, key=lambda curve: by_draft[curve.draft])
    return replace(best, tokens_per_second=by_draft)


def may_sample_drafts(settings: DecodeConfig, tree: TreeConfig) -> bool:
    """Say whether decoding samples its drafts, or may, if calibration finds that to be faster."""
    if settings.rule != "sampling" or settings.draft == "top":
        return False
    return settings.draft == "sampled" or (tree.kind == "calibrated" and not tree.lookup)


def draft_of(settings: DecodeConfig, tree: TreeConfig, out: Path, batch_size: int = 1) -> str:
    """Return what is drafted, top or sampled, for so many rows at a time.

    decode.draft=auto is what the run's calibration found to be faster, where it was made for this
    temperature, top_k and top_p; top otherwise, and beside tokens that are looked up.
    """
    if not may_sample_drafts(settings, tree):
        return "top"
    if settings.draft == "sampled":
        return "sampled"
    if not (out / CALIBRATION).is_file():
        return "top"
    calibration = load_calibration(out)
    if calibration.drawn_by != drawn_by(settings):
        log.warning(
            "%s is of %s, and decoding is of %s: the likeliest tokens are drafted "
            "(decode.draft=auto) until stage calibrate has run again",
            out / CALIBRATION,
            calibration.drawn_by or "greedy responses",
            drawn_by(settings),
        )
        return "top"
    return calibration.of_batch_size(batch_size).draft


def drawn_by(settings: DecodeConfig) -> dict[str, float | None] | None:
    """Return `Calibration.drawn_by` of responses that are made as decoding makes them."""
    if settings.rule != "sampling":
        return None
    return {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
    }


def summarize(
    curves: list[Curve],
    ranks: list[np.ndarray],
    max_rank: int,
    *,
    choices: Tree,
    heads_sha256: str,
    drawn_by: dict[str, float | None] | None = None,
    found: list[np.ndarray] | None = None,
) -> Calibration:
    """Return the calibration's record.

    `curves` go from the smallest batch on; `ranks` are ranks_PK of each answer, in which a guess
    that is not among the first ones has `max_rank`, of what the first curve drafts, and `found`
    found_P; the rest as in `Calibration`.
    """
    ranks_PK = np.concatenate(ranks)
    slower = [curve.batch_size for curve in curves if curve.predicted_speedup <= 1]
    return Calibration(
        **vars(curves[0]),
        num_positions=len(ranks_PK),
        rank_share=[
            [float((ranks_P == rank).mean()) for rank in range(max_rank)] for ranks_P in ranks_PK.T
        ],
        node_probability=node_shares(ranks, curves[0].tree, found),
        batch_sizes=curves,
        break_even_batch_size=min(slower, default=None),
        choices=choices,
        heads_sha256=heads_sha256,
        drawn_by=drawn_by,
    )


def choose_tree(
    settings: TreeConfig,
    out: Path,
    num_heads: int,
    batch_size: int = 1,
    head_vocab_size: int | None = None,
) -> Tree:
    """Return the tree that `tree` names, for so many rows at a time.

    A calibrated one is read from calibration.json, not from tree.json, which holds whatever tree
    was used last. A file that tree=custom names may have looked-up nodes of its own.

    Raises:
        UserError: there is no calibration yet, no such tree, it is deeper than there are heads, or
            asks for more guesses of one than there are tokens.
    """
    kind = settings.kind
    if kind == "chain":
        tree = chain(num_heads)
    elif kind == "custom":
        tree = _custom(settings)
    elif kind == "medusa_63":
        file = resources.files("medusa_exp.tree") / "medusa_63.json"
        with resources.as_file(file) as path:
            tree = Tree.load(path)
    else:
        calibration, num_nodes = load_calibration(out), settings.num_nodes
        curve = calibration.of_batch_size(batch_size)
        if kind == "dynamic":
            choices, wanted = calibration.choices, num_nodes or len(curve.tree)
            tree = replace(choices, num_picked=min(wanted, len(choices)))
        else:
            fastest = curve.tree if settings.lookup is None else curve.without_lookup()
            tree = fastest if num_nodes is None else curve.up_to(num_nodes)
    if tree.depth > num_heads:
        raise UserError(
            f"tree={kind} is {tree.depth} guesses deep, and there are {num_heads} heads: raise "
            "head.num_heads and train again, or choose another tree."
        )
    if head_vocab_size is not None and max(tree.ranks) >= head_vocab_size:
        raise UserError(
            f"tree={kind} ({settings.path or settings.paths}) has the rank {max(tree.ranks)}, and "
            f"a head can propose {head_vocab_size} tokens, of ranks 0 to {head_vocab_size - 1}: "
            "choose another tree."
        )
    return tree if settings.lookup is None else replace(tree, num_lookup=settings.lookup)


def _custom(settings: TreeConfig) -> Tree:
    if bool(settings.path) == bool(settings.paths):
        raise UserError("tree=custom needs either tree.path, a JSON file, or tree.paths.")
    if settings.path:
        return Tree.load(Path(settings.path))
    try:
        return Tree.from_paths(settings.paths)
    except ValueError as error:
        raise UserError(f"tree.paths: {error}") from error
