"""Stage calibrate: measure acceptance and step times, and choose the draft tree that is fastest.

1. The backbone responds to held-out prompts, and at each position we look up which draft token of
   each head is right. What counts is its own greedy response, not the data's: that is what decoding
   verifies.
2. From these ranks the best tree of every size is grown, and its steps are counted
   (`tree/search.py`).
3. Steps over these trees are timed on this device (`time_steps`), and the sizes that should be
   fastest are tried on some whole responses (`rehearse`): the fastest there wins.
4. Larger batches are timed too: the more rows, the fewer nodes pay, until none does.

K heads, P positions, C positions of a chunk, R ranks.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from medusa_exp.config import Config
from medusa_exp.data.prompts import prompts_of
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import GREEDY, Limits
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, StackedHeads, heads_input
from medusa_exp.model.scoring import CHUNK, answer_ranks
from medusa_exp.runs.progress import track
from medusa_exp.stages.session import Session
from medusa_exp.tree.calibration import (
    Calibration,
    Curve,
    Timing,
    choose,
    correct,
    heads_sha256,
    save_calibration,
    summarize,
)
from medusa_exp.tree.search import best_tree
from medusa_exp.tree.tree import Tree, chain

log = logging.getLogger(__name__)

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_BATCHED_SIZES = (1, 2, 4, 8, 16, 32)
"""Sizes that are timed in batches of more than one."""
_ROUNDS, _TIMED_TOKENS = 4, 48
"""How often each tree decodes while steps are timed, and how many new tokens."""
_BATCHED_ROUNDS, _BATCHED_TOKENS = 2, 24
"""The same in batches, whose rounds take longer."""
_REHEARSED_TREES, _REHEARSED_PROMPTS = 3, 12
"""Trees that should be fastest, tried on so many whole responses."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Measure, choose, and write `calibration.json` and `tree.json`."""
    session = session or Session(config, out)
    decoder = session.decoder(is_tree_known=False, is_measured=True)
    decoder.rule = GREEDY  # ranks are of greedy responses, whatever the rule of the evaluation
    backbone, heads = decoder.backbone, decoder.heads
    assert isinstance(heads, MedusaHeads | StackedHeads)
    prompts = _heldout_prompts(session, decoder)
    responses = [
        decoder.decode_plain([prompt])[0].tokens
        for prompt in track(prompts, "responding to held-out prompts")
    ]
    max_rank = min(config.tree.max_rank, backbone.vocab_size)
    ranks = [
        head_ranks(backbone, heads, prompt, response, max_rank)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    if decoder.is_recurrent:
        trees = [
            chain(depth) for depth in range(min(heads.num_heads, config.tree.max_nodes - 1) + 1)
        ]
    else:
        trees = grown_trees(ranks, config.tree.max_nodes, max_rank)
    with_longest_response = prompts[int(np.argmax([len(response) for response in responses]))]
    curves = [
        _at_batch_size(decoder, ranks, trees, with_longest_response, size)
        for size in sorted(set(config.tree.batch_sizes))
    ]
    if curves[0].batch_size == 1:  # prompts are rehearsed one at a time
        curves[0] = _rehearsed(decoder, curves[0], prompts, ranks)
    calibration = summarize(
        curves, ranks, max_rank, choices=trees[-1], heads_sha256=heads_sha256(out)
    )
    save_calibration(calibration, out)
    tree = session.tree(decoder)
    tree.save(out / "tree.json")
    log.info("tree of %d nodes, depth %d", tree.num_checked, tree.depth)
    return _metrics(calibration)


@torch.inference_mode()
def head_ranks(
    backbone: Backbone,
    heads: MedusaHeads | StackedHeads,
    prompt_ids: list[int],
    response_ids: list[int],
    max_rank: int,
) -> np.ndarray:
    """Return ranks_PK: where token t of the response is certain, head k's rank of token t+k.

    What is not among the first `max_rank` draft tokens of a head, or stands beyond the end of the
    response, has rank `max_rank`. They are picked as `decode.drafting` picks them, ties included.
    """
    num_heads = heads.num_heads
    ids = torch.tensor([*prompt_ids, *response_ids], device=backbone.device)
    read_1TD = heads_input(heads.prefix, backbone.hidden_states(ids[None]))
    hidden_PD = read_1TD[0, len(prompt_ids) - 1 : -1]
    if isinstance(heads, MedusaHeads) and heads.is_sequential:
        return answer_ranks(heads, ids[len(prompt_ids) :], hidden_PD, max_rank)
    response = torch.cat([ids[len(prompt_ids) :], ids.new_full((num_heads,), -1)])
    truth_PK = response.unfold(0, num_heads + 1, 1)[:, 1:]
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


def _heldout_prompts(session: Session, decoder: Decoder) -> list[list[int]]:
    assert decoder.tokenizer is not None
    prompts = prompts_of(
        session.split("val"),
        decoder.tokenizer,
        max_tokens=session.prompt_tokens(decoder.backbone.max_length),
        has_room=session.has_room(decoder.backbone),
        num_prompts=session.config.tree.num_prompts,
    )
    return [prompt.input_ids for prompt in prompts]


def time_steps(
    decoder: Decoder,
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
    room = decoder.backbone.max_length_from(len(prompt)) - len(prompt)
    limits = Limits(max(2, min(new_tokens, room)))  # a step after the prompt's, at least
    prompts = [prompt] * batch_size
    for round_number in track(range(rounds + 1), f"timing steps, {batch_size} at a time"):
        response = decoder.decode_plain(prompts, limits)[0]
        for tree in trees:
            over_tree = decoder.decode(prompts, limits, tree=tree)[0]
            if round_number:  # the first round warms up
                seconds[tree] += over_tree.step_seconds[1:]
                prefill.append(over_tree.step_seconds[0])
        if round_number:
            plain += response.step_seconds[1:]
    by_tree = {tree: median(taken) for tree, taken in seconds.items()}
    return Timing(batch_size, by_tree, median(plain), median(prefill))


def rehearse(
    decoder: Decoder, trees: Sequence[Tree], prompts: list[list[int]]
) -> dict[Tree | None, float]:
    """Decode prompts over each tree and plainly (None), in turn; return the seconds of each.

    Steps that are timed alone are warm; a whole response has cold ones, and much that is no step.
    Steps of fixed shapes are captured at their first call for prompts of about a length. That
    happens once, and is no part of a response: there each is decoded twice, and the second counts.
    """
    ways: list[Tree | None] = [None, *trees]
    seconds = dict.fromkeys(ways, 0.0)
    for number, prompt in enumerate(track(prompts, "rehearsing")):
        first = number % len(ways)  # who begins changes: the first pays for what is cold
        for way in ways[first:] + ways[:first]:
            if decoder.uses_fixed_shapes:
                _respond(decoder, prompt, way)
            start = time.perf_counter()
            _respond(decoder, prompt, way)
            # It ends with tokens on the host: nothing is left to wait for.
            seconds[way] += time.perf_counter() - start
    return seconds


def _respond(decoder: Decoder, prompt: list[int], tree: Tree | None) -> None:
    if tree is None:
        decoder.decode_plain([prompt])
    else:
        decoder.decode([prompt], tree=tree)


def _at_batch_size(
    decoder: Decoder,
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
        decoder, trees, prompt, batch_size=batch_size, rounds=rounds, new_tokens=new_tokens
    )
    return choose(ranks, timing)


def _rehearsed(
    decoder: Decoder, curve: Curve, prompts: list[list[int]], ranks: list[np.ndarray]
) -> Curve:
    """Decode some prompts over the trees that should be fastest; return what is then to be chosen.

    Args:
        decoder: with the heads that the trees are for.
        curve: of `choose`, for batch size 1.
        prompts: of which the first few are decoded.
        ranks: ranks_PK of the response to each prompt.
    """
    fastest = [point.tree for point in curve.fastest()[:_REHEARSED_TREES]]
    seconds = rehearse(decoder, fastest, prompts[:_REHEARSED_PROMPTS])
    return correct(curve, seconds, ranks[:_REHEARSED_PROMPTS])


def _metrics(calibration: Calibration) -> dict[str, float]:
    """Return what the stage found; say so where it is that no tree pays."""
    if calibration.predicted_speedup < 1:
        log.warning(
            "no tree pays here: too few draft tokens of the heads are accepted (see "
            "val/top1_head1), or a step on this device costs too much for what is"
        )
    names = ["num_nodes", "predicted_tokens_per_step", "predicted_speedup"]
    if calibration.break_even_batch_size is not None:
        names.append("break_even_batch_size")
    return {f"calibrate/{name}": float(getattr(calibration, name)) for name in names}
