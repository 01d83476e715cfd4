"""One sentence of advice for each cause of a speed-up that is smaller than it could be.

A sentence says what was measured, in the unit that its cause has, and names a config key to change.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from medusa_exp.evaluate.break_even import BreakEven, prompts
from medusa_exp.evaluate.waterfall import Waterfall, Way
from medusa_exp.model.heads import FREQUENT_TOKENS

SMALL = 0.01
"""Share of the ideal below which no part is worth a change."""


@dataclass(frozen=True)
class Tried:
    """The fastest tree with guesses that calibration tried."""

    num_nodes: int
    tokens_per_step: float
    speedup: float
    """Over plain decoding, prompts included."""
    top1: float | None = None
    """How often the first head's likeliest guess came true."""


@dataclass(frozen=True)
class Facts:
    """What was measured and how, as far as advice depends on it."""

    num_heads: int
    num_layers: int
    has_projections: bool
    """Has each head a whole projection to the vocabulary of its own?"""
    vocab_size: int
    tree_kind: str
    num_nodes: int
    device_type: str
    is_captured: bool
    """Are steps captured as CUDA graphs?"""
    uses_kernels: bool
    """Do kernels verify?"""
    is_regenerated: bool
    """Were the heads trained on the model's own answers?"""
    tokens_per_step: float
    max_new_tokens: int
    when: BreakEven
    reasons: Sequence[str] = field(default_factory=tuple)
    """Why decoding may accept less than validation."""
    run_dir: str = "RUN_DIR"
    is_calibrated: bool = True
    """Has the run a calibration?"""
    can_calibrate: bool = True
    """Has its data set prompts for one?"""
    is_tree_set: bool = False
    """Did the config say which tree it is, or of how many nodes?"""
    tried: Tried | None = None
    """None without a calibration."""

    @property
    def calibration(self) -> str | None:
        """How to decode over the tree that is fastest here; None where it is decoded so, or no
        prompts are held out to find it."""
        stages = "[evaluate]" if self.is_calibrated else "[calibrate,evaluate]"
        words = ("python", "-m", "medusa_exp", f"stages={stages}", f"run_dir={self.run_dir}")
        if self.tree_kind == "calibrated" or not (self.is_calibrated or self.can_calibrate):
            return None
        return f"`{shlex.join([*words, 'tree=calibrated'])}`"


def advice(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    """Return what to do about the largest part of a waterfall, or about a tree without guesses.

    Args:
        found: the way down.
        tree, plain: what it was made of.
        facts: about the run.
    """
    if facts.num_nodes == 1:
        return _no_guesses(facts)
    part = found.largest
    if part.share < SMALL:
        return "Next to nothing is lost: more tokens per step are what would make it faster."
    return _SENTENCES[part.name](found, tree, plain, facts)


def share_of_step(way: Way, *parts: str) -> float:
    """Return which share (0..1) of a step after the prompt's some of PARTS_OF_TIME take."""
    of_all = sum(way.of_a_step.values())
    return sum(way.of_a_step.get(part, 0.0) for part in parts) / of_all if of_all else 0.0


def _no_guesses(facts: Facts) -> str:
    said = "No guesses are drafted, as the tree has one node: this is plain decoding."
    tried = facts.tried
    if tried is None:
        how = f": {facts.calibration} takes as many nodes as pay here" if facts.calibration else ""
        return f"{said} A tree of more nodes may be faster{how}."
    if facts.is_tree_set and tried.speedup > 1:
        return (
            f"{said} Calibration found a tree of {tried.num_nodes} nodes to be "
            f"{tried.speedup:.2f} times as fast: tree=calibrated tree.num_nodes=null takes it."
        )
    right = "" if tried.top1 is None else f" (the first head is right {tried.top1:.0%} of the time)"
    own = "" if facts.is_regenerated else ", or on the model's own answers (train.text=regenerated)"
    return (
        f"{said} The heads guess too badly{right}, or a step costs too much here: over the fastest "
        f"tree with guesses that calibration timed, of {tried.num_nodes} nodes, a step makes "
        f"{tried.tokens_per_step:.2f} tokens in the time in which plain decoding makes "
        f"{tried.tokens_per_step / tried.speedup:.2f}. Train longer{own}."
    )


def _lost(found: Waterfall) -> str:
    return f" ({found.largest.share:.0%} of the ideal)"


def _acceptance(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    why = "; ".join(facts.reasons) or (
        "nothing was found that explains it, see the samples of stages=[inspect] and "
        "eval/category/*"
    )
    return (
        f"Acceptance falls from {found.ideal:.2f} tokens a step in validation to "
        f"{facts.tokens_per_step:.2f} in decoding{_lost(found)}: {why}."
    )


def _prompt(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    share = tree.prompt_seconds / tree.seconds
    return (
        f"Prompts take {share:.0%} of the time{_lost(found)}, and drafts speed up none of "
        f"it: longer answers show what the heads are worth (decode.max_new_tokens, now "
        f"{facts.max_new_tokens}), and shorter prompts."
    )


def _heads(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    said = f"The heads take {share_of_step(tree, 'heads'):.0%} of a step{_lost(found)}: take "
    if facts.num_layers > 1:
        return f"{said}head.num_layers=1, which is {facts.num_layers} now, and train again."
    fewer, why = f"fewer of them (head.num_heads, now {facts.num_heads})", ""
    if facts.num_heads == 1:
        fewer = "fewer tokens for it to choose from (head=medusa_lowrank with head.num_tokens)"
    else:
        why = ": the later ones are accepted least"
    if facts.has_projections:
        said += "head=medusa_tied, whose heads share the backbone's lm_head, or "
        frequent = f"head=medusa_lowrank with head.num_tokens={FREQUENT_TOKENS}"
        return (
            f"{said}{frequent if facts.vocab_size > FREQUENT_TOKENS else fewer}, and train again."
        )
    return f"{said}{fewer}, and train again{why}."


def _width(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    one, many = (
        sum(way.of_a_step.get(name, 0.0) for name in ("backbone", "mask")) for way in (plain, tree)
    )
    times = f" {many / one:.1f} times as long as" if one else " longer than"
    said = (
        f"The backbone takes{times} over one token for the {facts.num_nodes} nodes of the "
        f"tree{_lost(found)}: "
    )
    if facts.tree_kind != "calibrated":
        wanted = "fewer may be faster here"
        if facts.calibration is not None:
            wanted = f"{facts.calibration} takes as many as pay here"
        kind = "a tree of its own at each step" if facts.tree_kind == "dynamic" else "a fixed tree"
        return f"{said}{wanted} (this run used {kind}, tree={facts.tree_kind})."
    if facts.device_type == "cpu":
        return (
            f"{said}a processor has little arithmetic to spare beside one token's. The tree is the "
            "fastest of those that calibration tried; on a GPU more nodes cost nearly nothing."
        )
    own = "" if facts.is_regenerated else ", or on the model's own answers (train.text=regenerated)"
    return (
        f"{said}the tree is the fastest of those that calibration tried. Heads that are right more "
        f"often need fewer nodes: train longer{own}."
    )


def _verification(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    share = share_of_step(tree, "verification", "cache")
    said = f"Verification, and keeping what is accepted, take {share:.0%} of a step{_lost(found)}: "
    if facts.device_type == "cuda" and not facts.uses_kernels:
        return f"{said}let the kernels do it (decode.verifier=cupy), or take a smaller tree."
    how = f"; {facts.calibration} takes the fastest" if facts.calibration is not None else ""
    if facts.tree_kind == "calibrated":
        how = f"; tree.num_nodes={max(1, facts.num_nodes // 2)} for one"
    return f"{said}take a smaller tree (now {facts.num_nodes} nodes{how})."


def _host(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    share = share_of_step(tree, "rest")
    said = f"The host takes {share:.0%} of a step between its parts{_lost(found)}: "
    if facts.device_type == "cuda" and not facts.is_captured:
        return f"{said}have steps captured (decode.cuda_graph=true)."
    return (
        f"{said}it may be busy with other work, or slow. Steps of fixed shapes leave it less to do "
        "(decode.compile=true), and larger models give it more time."
    )


def _batch(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    when, size = facts.when, found.batch_size
    limit = when.drafts_up_to
    is_faster = any(s > 1 and not when.is_unclear(n) for n, s in when.speedups.items())
    wanted = f"speculate up to {prompts(limit)} at a time" if limit else "decode plainly"
    if limit and not is_faster:
        wanted = f"decode plainly from {prompts(limit + 1)} at a time on"
    if when.size is None:
        wanted = "drafts pay there still, but fewer of them"
        if when.is_unclear(size):
            wanted = "whether drafts pay there is not clear, and fewer of them may do better"
    calibrate = (
        f", and calibrate for this size (tree=calibrated, tree.batch_sizes with {size} in it)"
    )
    return (
        f"{prompts(size)} at a time keep the device busy without drafts{_lost(found)}: "
        f"{wanted}{calibrate if facts.is_calibrated or facts.can_calibrate else ''}."
    )


def _unexplained(found: Waterfall, tree: Way, plain: Way, facts: Facts) -> str:
    return (
        f"Steps took longer than their parts do when they are timed alone{_lost(found)}: the "
        "machine may have been busy with other work. Measure again, with evaluate.repeats=3."
    )


_SENTENCES = {
    "acceptance": _acceptance,
    "prompt": _prompt,
    "heads": _heads,
    "width": _width,
    "verification": _verification,
    "host": _host,
    "batch": _batch,
    "unexplained": _unexplained,
}
