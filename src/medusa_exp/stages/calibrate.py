"""Stage calibrate: heads and held-out prompts in; the tree that is fastest here out.

1. The backbone answers held-out prompts, and at each position we look up which guess of each head
   came true. What counts is its own greedy answer, not the data's: that is what decoding verifies.
2. From these ranks the best tree of every size is grown, and its steps are counted (`growth.py`).
3. Steps over these trees are timed on this device, and the sizes that should answer fastest are
   tried on some of the prompts: the fastest there wins (`timing.py`).
4. Larger batches are timed too: the more rows, the fewer nodes pay, until none does.

K heads, P positions, C positions of a chunk, R ranks.

How long steps and answers take here: over several trees, and plainly, in turn.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.prompts import prompts_of
from medusa_exp.decode.loop import Limits, decode_plain, decode_tree
from medusa_exp.decode.settings import limits_of
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import MedusaHeads, StackedHeads, heads_input, stack_heads
from medusa_exp.model.scoring import CHUNK, answer_ranks
from medusa_exp.runs.progress import track
from medusa_exp.stages.session import Session
from medusa_exp.tree.calibration import (
    Calibration,
    Curve,
    Timing,
    choose,
    choose_tree,
    correct,
    heads_sha256,
    save_calibration,
    summarize,
)
from medusa_exp.tree.search import best_tree
from medusa_exp.tree.tree import Tree


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


log = logging.getLogger(__name__)

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_BATCHED_SIZES = (1, 2, 4, 8, 16, 32)
"""Sizes that are timed in batches of more than one."""
_ROUNDS, _TIMED_TOKENS = 4, 48
"""How often each tree answers while steps are timed, and how many new tokens."""
_BATCHED_ROUNDS, _BATCHED_TOKENS = 2, 24
"""The same in batches, whose rounds take longer."""
_REHEARSED_TREES, _REHEARSED_PROMPTS = 3, 12
"""Trees that should be fastest, tried on so many whole answers."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Measure, choose, and write `calibration.json` and `tree.json`."""
    session = session or Session(config, out)
    backbone = session.backbone()
    tokenizer = session.tokenizer()
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    prompts = _heldout_prompts(session, backbone, tokenizer)
    limits = limits_of(config, backbone, tokenizer)
    answers = [
        decode_plain(backbone, [prompt], limits)[0].tokens
        for prompt in track(prompts, "answering held-out prompts")
    ]
    max_rank = min(config.tree.max_rank, backbone.vocab_size)
    ranks = [
        head_ranks(backbone, heads, prompt, answer, max_rank)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    trees = grown_trees(ranks, config.tree.max_nodes, max_rank)
    with_longest_answer = prompts[int(np.argmax([len(answer) for answer in answers]))]
    curves = [
        _at_batch_size(backbone, heads, ranks, trees, with_longest_answer, size)
        for size in sorted(set(config.tree.batch_sizes))
    ]
    if curves[0].batch_size == 1:  # prompts are rehearsed one at a time
        curves[0] = _rehearsed(backbone, heads, curves[0], prompts, ranks, limits)
    calibration = summarize(
        curves, ranks, max_rank, choices=trees[-1], heads_sha256=heads_sha256(out)
    )
    save_calibration(calibration, out)
    tree = choose_tree(config, out, heads.num_heads)
    tree.save(out / "tree.json")
    log.info("tree of %d nodes, depth %d", tree.num_checked, tree.depth)
    return _metrics(calibration)


@torch.inference_mode()
def head_ranks(
    backbone: Backbone,
    heads: MedusaHeads | StackedHeads,
    prompt_ids: list[int],
    answer_ids: list[int],
    max_rank: int,
) -> np.ndarray:
    """Return ranks_PK: where token t of the answer is certain, the rank of token t+k to head k.

    What is not among the first `max_rank` guesses, or stands beyond the answer's end, has rank
    `max_rank`. Guesses are picked as `decode.propose` picks them, ties included.
    """
    num_heads = heads.num_heads
    ids = torch.tensor([*prompt_ids, *answer_ids], device=backbone.device)
    read_1TD = heads_input(heads.prefix, backbone.hidden_states(ids[None]))
    hidden_PD = read_1TD[0, len(prompt_ids) - 1 : -1]
    if isinstance(heads, MedusaHeads) and heads.is_sequential:
        return answer_ranks(heads, ids[len(prompt_ids) :], hidden_PD, max_rank)
    answer = torch.cat([ids[len(prompt_ids) :], ids.new_full((num_heads,), -1)])
    truth_PK = answer.unfold(0, num_heads + 1, 1)[:, 1:]
    rank_R = torch.arange(max_rank, device=ids.device)
    found = []
    for hidden_CD, truth_CK in zip(hidden_PD.split(CHUNK), truth_PK.split(CHUNK), strict=True):
        draft_CKR = heads(hidden_CD.to(heads.dtype)).topk(max_rank, dim=-1).indices
        is_true_CKR = draft_CKR == truth_CK[..., None]
        found.append(torch.where(is_true_CKR, rank_R, max_rank).amin(-1))
    return torch.cat(found).cpu().numpy()


def grown_trees(ranks: list[np.ndarray], max_nodes: int, max_rank: int) -> list[Tree]:
    """Return the best tree of each of some sizes, the smallest first."""
    sizes = [*(size for size in _SIZES if size < max_nodes), max_nodes]
    return list(dict.fromkeys(best_tree(ranks, size, max_rank) for size in sizes))


def thinned(trees: list[Tree]) -> list[Tree]:
    """Return fewer of these trees: for each of some sizes the largest that has no more nodes."""
    fitting = [[tree for tree in trees if len(tree) <= size] for size in _BATCHED_SIZES]
    return list(dict.fromkeys(max(some, key=len) for some in fitting if some))


def _heldout_prompts(
    session: Session, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    prompts = prompts_of(
        session.split("val"),
        tokenizer,
        max_tokens=session.prompt_tokens(backbone.max_length),
        num_prompts=session.config.tree.num_prompts,
    )
    return [prompt.input_ids for prompt in prompts]


def _at_batch_size(
    backbone: Backbone,
    heads: MedusaHeads | StackedHeads,
    ranks: list[np.ndarray],
    trees: list[Tree],
    prompt: list[int],
    batch_size: int,
) -> Curve:
    """Time steps of so many rows and return `choose`'s findings."""
    rounds, new_tokens = _ROUNDS, _TIMED_TOKENS
    if batch_size > 1:
        rounds, new_tokens = _BATCHED_ROUNDS, _BATCHED_TOKENS
        trees = thinned(trees)
    timing = time_steps(
        backbone,
        heads,
        trees,
        prompt,
        batch_size=batch_size,
        rounds=rounds,
        new_tokens=new_tokens,
    )
    return choose(ranks, timing)


def _rehearsed(
    backbone: Backbone,
    heads: MedusaHeads | StackedHeads,
    curve: Curve,
    prompts: list[list[int]],
    ranks: list[np.ndarray],
    limits: Limits,
) -> Curve:
    """Let the trees that should be fastest answer some prompts; return what is then to be chosen.

    Args:
        backbone: answers.
        heads: guess.
        curve: of `choose`, for batch size 1.
        prompts: of which the first few are answered.
        ranks: ranks_PK of the answer to each prompt.
        limits: where answers end.
    """
    fastest = [point.tree for point in curve.fastest()[:_REHEARSED_TREES]]
    seconds = rehearse(backbone, heads, fastest, prompts[:_REHEARSED_PROMPTS], limits)
    return correct(curve, seconds, ranks[:_REHEARSED_PROMPTS])


def _metrics(calibration: Calibration) -> dict[str, float]:
    """Return what the stage found; say so where it is that no tree pays."""
    if calibration.predicted_speedup < 1:
        log.warning(
            "no tree pays here: the heads guess too little of what the model says (see "
            "val/top1_head1), or a step on this device costs too much for what they guess"
        )
    names = ["num_nodes", "predicted_tokens_per_step", "predicted_speedup"]
    if calibration.break_even_batch_size is not None:
        names.append("break_even_batch_size")
    return {f"calibrate/{name}": float(getattr(calibration, name)) for name in names}
