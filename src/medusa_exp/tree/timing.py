"""How long steps and answers take here: over several trees, and plainly, in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import nn

from medusa_exp.decode.answers import Limits
from medusa_exp.decode.loop import decode_plain, decode_tree
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.progress import track
from medusa_exp.tree.tree import Tree


@dataclass
class Timing:
    """Median seconds of a step of `batch_size` rows: over each tree, plain, and the prompts'."""

    batch_size: int
    by_tree: dict[Tree, float]
    plain: float
    prefill: float


def time_steps(
    backbone: Backbone,
    heads: nn.Module,
    trees: Sequence[Tree],
    prompt: list[int],
    *,
    batch_size: int,
    rounds: int,
    new_tokens: int,
) -> Timing:
    """Time whole decoding steps over several trees, in turn, round by round.

    Every row of the batch is the same prompt, so that all rows end together.
    """
    seconds: dict[Tree, list[float]] = {tree: [] for tree in trees}
    plain: list[float] = []
    prefill: list[float] = []
    # Without stop ids: every round takes the same number of tokens.
    room = backbone.max_length_from(len(prompt)) - len(prompt)
    limits = Limits(max(2, min(new_tokens, room)))  # a step after the prompt's, at least
    prompts = [prompt] * batch_size
    what = f"timing steps, {batch_size} at a time"
    for round_number in track(range(rounds + 1), what):
        answer = decode_plain(backbone, prompts, limits)[0]
        for tree in trees:
            over_tree = decode_tree(backbone, heads, tree, prompts, limits)[0]
            if round_number:  # the first round warms up
                seconds[tree] += over_tree.step_seconds[1:]
                prefill.append(over_tree.step_seconds[0])
        if round_number:
            plain += answer.step_seconds[1:]
    by_tree = {tree: median(taken) for tree, taken in seconds.items()}
    return Timing(batch_size, by_tree, median(plain), median(prefill))


def rehearse(
    backbone: Backbone,
    heads: nn.Module,
    trees: Sequence[Tree],
    prompts: list[list[int]],
    limits: Limits,
) -> dict[Tree | None, float]:
    """Answer prompts over each tree and plainly (None), in turn; return the seconds of each.

    Steps that are timed alone are warm; a whole answer has cold ones, and much that is no step.
    """
    ways: list[Tree | None] = [None, *trees]
    seconds = dict.fromkeys(ways, 0.0)
    for number, prompt in enumerate(track(prompts, "rehearsing")):
        first = number % len(ways)  # who begins changes: the first pays for what is cold
        for way in ways[first:] + ways[:first]:
            start = time.perf_counter()
            if way is None:
                decode_plain(backbone, [prompt], limits)
            else:
                decode_tree(backbone, heads, way, [prompt], limits)
            # Both end with tokens on the host: nothing is left to wait for.
            seconds[way] += time.perf_counter() - start
    return seconds
