"""Stage calibrate: heads and held-out prompts in; the tree that is fastest here out.

1. The backbone answers held-out prompts, and at each position we look up which guess of each head
   came true. What counts is its own greedy answer, not the data's: that is what decoding verifies.
2. From these ranks the best tree of every size is grown, and its steps are counted (`growth.py`).
3. Steps over these trees are timed on this device, and the size that answers fastest wins.

K heads, P positions, V vocabulary.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import track

from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt, prompts_of
from medusa_exp.data.sources import load_split
from medusa_exp.decode.answers import Decoded, Limits
from medusa_exp.decode.loop import decode_plain, decode_tree
from medusa_exp.decode.settings import limits_of
from medusa_exp.files import write_json
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import MedusaHeads, StackedHeads, stack_heads
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.tokenizer import load_tokenizer
from medusa_exp.tree.choice import CALIBRATION, choose_tree, heads_sha256
from medusa_exp.tree.growth import best_tree, node_shares, num_steps
from medusa_exp.tree.tree import Tree

log = logging.getLogger(__name__)

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_TIMING_ROUNDS = 4
_TIMING_TOKENS = 48


@dataclass
class Timing:
    """Median seconds of a step over each tree, of a plain step, and of a prompt's step."""

    by_tree: dict[Tree, float]
    plain: float
    prefill: float


def run(config: Config, out: Path) -> dict[str, float]:
    """Measure, choose, and write `calibration.json` and `tree.json`."""
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    prompts = prompts_of(
        load_split(config, "val"),
        tokenizer,
        config,
        max_positions=backbone.max_length,
        num_prompts=config.tree.num_prompts,
    )
    limits = limits_of(config, backbone, tokenizer)
    answers = [
        decode_plain(backbone, [prompt.input_ids], limits)[0]
        for prompt in track(prompts, "answering held-out prompts")
    ]
    max_rank = min(config.tree.max_rank, backbone.vocab_size)
    ranks = [
        head_ranks(backbone, heads, prompt.input_ids, answer.tokens, max_rank)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    max_nodes = config.tree.max_nodes
    sizes = [*(size for size in _SIZES if size < max_nodes), max_nodes]
    trees = dict.fromkeys(best_tree(ranks, size, max_rank) for size in sizes)
    timing = time_steps(backbone, heads, list(trees), prompts, answers)
    calibration = choose(ranks, timing, max_rank)
    calibration["heads_sha256"] = heads_sha256(out)
    write_json(out / CALIBRATION, calibration)
    tree = choose_tree(config, out, heads.num_heads)
    tree.save(out / "tree.json")
    log.info("tree of %d nodes, depth %d", len(tree), tree.depth)
    if calibration["predicted_speedup"] < 1:
        log.warning(
            "no tree pays here: the heads guess too little of what the model says (see "
            "val/top1_head1), or a step on this device costs too much for what they guess"
        )
    return {
        f"calibrate/{name}": float(calibration[name])
        for name in ("num_nodes", "predicted_tokens_per_step", "predicted_speedup")
    }


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
    hidden_PD = backbone.hidden_states(ids[None])[0, len(prompt_ids) - 1 : -1]
    logits_PKV = heads(hidden_PD.to(heads.dtype))
    answer = torch.cat([ids[len(prompt_ids) :], ids.new_full((num_heads,), -1)])
    truth_PK = answer.unfold(0, num_heads + 1, 1)[:, 1:]
    guesses_PKR = logits_PKV.topk(max_rank, dim=-1).indices
    is_true_PKR = guesses_PKR == truth_PK[..., None]
    rank_R = torch.arange(max_rank, device=ids.device)
    return torch.where(is_true_PKR, rank_R, max_rank).amin(-1).cpu().numpy()


def time_steps(
    backbone: Backbone,
    heads: MedusaHeads | StackedHeads,
    trees: list[Tree],
    prompts: list[Prompt],
    answers: list[Decoded],
) -> Timing:
    """Time whole decoding steps over several trees, in turn, round by round."""
    seconds: dict[Tree, list[float]] = {tree: [] for tree in trees}
    plain: list[float] = []
    longest = max(range(len(answers)), key=lambda i: len(answers[i].tokens))
    prompt = prompts[longest].input_ids
    # Without stop ids: every round takes the same number of tokens.
    room = backbone.max_length_from(len(prompt)) - len(prompt)
    limits = Limits(max(2, min(_TIMING_TOKENS, room)))  # a step after the prompt's, at least
    for round_number in track(range(_TIMING_ROUNDS + 1), "timing steps"):
        [answer] = decode_plain(backbone, [prompt], limits)
        for tree in trees:
            [over_tree] = decode_tree(backbone, heads, tree, [prompt], limits)
            if round_number:  # the first round warms up
                seconds[tree] += over_tree.step_seconds[1:]
        if round_number:
            plain += answer.step_seconds[1:]
    by_tree = {tree: median(taken) for tree, taken in seconds.items()}
    return Timing(by_tree, median(plain), median(answer.step_seconds[0] for answer in answers))


def choose(answers: list[np.ndarray], timing: Timing, max_rank: int = 10) -> dict[str, Any]:
    """Return the calibration's record: the curve, the fastest tree, and what it promises.

    Args:
        answers: ranks_PK of each answer.
        timing: of the trees to choose from.
        max_rank: how many ranks of each head to report.
    """
    num_tokens = sum(len(ranks_PK) for ranks_PK in answers)
    prefill = len(answers) * timing.prefill
    plain_seconds = prefill + (num_tokens - len(answers)) * timing.plain
    curve, total_seconds = [], {}
    for tree, step_seconds in timing.by_tree.items():
        steps = num_steps(answers, tree)
        total_seconds[tree] = prefill + (steps - len(answers)) * step_seconds
        curve.append(
            {
                "num_nodes": len(tree),
                "tokens_per_step": num_tokens / steps,
                "step_seconds": step_seconds,
                "tokens_per_second": num_tokens / total_seconds[tree],
            }
        )
    best = min(total_seconds, key=lambda tree: total_seconds[tree])
    ranks_PK = np.concatenate(answers)
    return {
        "num_positions": num_tokens,
        "rank_share": [
            [float((ranks_P == rank).mean()) for rank in range(max_rank)] for ranks_P in ranks_PK.T
        ],
        "curve": curve,
        "plain_step_seconds": timing.plain,
        "num_nodes": len(best),
        "tree": {"parents": list(best.parents), "ranks": list(best.ranks)},
        "node_probability": node_shares(answers, best),
        "predicted_tokens_per_step": num_tokens / num_steps(answers, best),
        "predicted_speedup": plain_seconds / total_seconds[best],
    }
