"""Stage calibrate: heads and held-out prompts in; the tree that is fastest here out.

1. The backbone answers held-out prompts, and at each position we look up which guess of each head
   came true. What counts is its own greedy answer, not the data's: that is what decoding verifies.
2. The share of positions at which a whole path of guesses came true is the value of its last
   node. Growing a tree by the most valuable node next gives the best tree of every size: a child
   is never worth more than its parent.
3. Steps over trees of several sizes are timed on this device, and the size with the most expected
   tokens per second wins.

K heads, P positions.
"""

import heapq
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from rich.progress import track

from medusa_exp.config import Config
from medusa_exp.data.sources import load_split
from medusa_exp.decode.loop import Decoded, decode_plain, decode_tree
from medusa_exp.evaluate.prompts import Prompt, prompts_of, stop_ids
from medusa_exp.files import write_json
from medusa_exp.model.backbone import Backbone, load_backbone, load_tokenizer
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import MedusaHeads
from medusa_exp.tree.choice import CALIBRATION, choose_tree
from medusa_exp.tree.tree import Path_, Tree

log = logging.getLogger(__name__)

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_TIMING_ROUNDS = 3
_TIMING_TOKENS = 48


@dataclass
class Timing:
    """Median seconds of a step, by number of nodes; of a plain step; and of a prompt's."""

    by_size: dict[int, float]
    plain: float
    prefill: float


def run(config: Config, out: Path) -> dict[str, float]:
    """Measure, choose, and write `calibration.json` and `tree.json`."""
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    heads = load_heads(out / "heads", backbone)
    prompts = prompts_of(load_split(config, "val"), tokenizer, config, backbone.max_length)
    prompts = prompts[: config.tree.num_prompts]
    stops = stop_ids(config, backbone, tokenizer)
    limit = config.decode.max_new_tokens
    answers = [
        decode_plain(backbone, prompt.input_ids, max_new_tokens=limit, stop_ids=stops)
        for prompt in track(prompts, "answering held-out prompts")
    ]
    ranks_PK = np.concatenate(
        [
            head_ranks(backbone, heads, prompt.input_ids, answer.tokens, stops)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )
    nodes = grow(prefix_counts(ranks_PK, config.tree.max_rank), config.tree.max_nodes)
    timing = time_steps(backbone, heads, nodes, prompts, answers)
    calibration = choose(nodes, timing, ranks_PK, answers)
    write_json(out / CALIBRATION, calibration)
    tree = choose_tree(config, out, heads.num_heads)
    tree.save(out / "tree.json")
    log.info("tree of %d nodes, depth %d", len(tree), tree.depth)
    return {
        "calibrate/num_nodes": calibration["num_nodes"],
        "calibrate/predicted_tokens_per_step": calibration["predicted_tokens_per_step"],
        "calibrate/predicted_speedup": calibration["predicted_speedup"],
    }


@torch.inference_mode()
def head_ranks(
    backbone: Backbone,
    heads: MedusaHeads,
    prompt_ids: list[int],
    answer_ids: list[int],
    stops: frozenset[int],
) -> np.ndarray:
    """Return ranks_PK: at each position, the rank that head k gave to the token that came.

    A position is one that decoding may draft from: the prompt's last token and the answer's. A
    token after a stop never comes, so its rank is V. If the answer was cut off by its limit,
    the last K positions are left out, for what would have come there is not known.
    """
    num_heads = heads.num_heads
    ids = torch.tensor([*prompt_ids, *answer_ids], device=backbone.device)
    hidden_PD = backbone.hidden_states(ids[None])[0, len(prompt_ids) - 1 : -1]
    is_whole = answer_ids[-1] in stops
    num_positions = len(answer_ids) if is_whole else max(0, len(answer_ids) - num_heads)
    logits_PKV = heads(hidden_PD[:num_positions])
    padded = torch.cat([ids[len(prompt_ids) :], ids.new_full((num_heads + 1,), -1)])
    truth_PK = padded.unfold(0, num_heads + 1, 1)[:num_positions, 1:]
    true_logits_PK1 = logits_PKV.gather(2, truth_PK.clamp(min=0)[..., None])
    ranks_PK = (logits_PKV > true_logits_PK1).sum(-1)
    return ranks_PK.masked_fill(truth_PK < 0, logits_PKV.shape[-1]).cpu().numpy()


def prefix_counts(ranks_PK: np.ndarray, max_rank: int) -> dict[Path_, float]:
    """Return, for each path of ranks below `max_rank`, the share of positions where it came true.

    A path is counted as a whole: the product of its heads' shares would miss that they err
    together.
    """
    counts: Counter[Path_] = Counter()
    for row in ranks_PK.tolist():
        for depth, rank in enumerate(row, 1):
            if rank >= max_rank:
                break
            counts[tuple(row[:depth])] += 1
    return {path: count / len(ranks_PK) for path, count in counts.items()}


def grow(value: dict[Path_, float], max_nodes: int) -> list[tuple[Path_, float]]:
    """Return (path, value) of the best tree's nodes in the order in which they are added.

    The first n of them, with the root, are the best tree of n + 1 nodes. Ties go to the
    shallower and then to the likelier guess.
    """
    children: dict[Path_, list[Path_]] = {}
    for path in value:
        children.setdefault(path[:-1], []).append(path)
    frontier = [(-value[path], len(path), path) for path in children.get((), [])]
    heapq.heapify(frontier)
    nodes: list[tuple[Path_, float]] = []
    while frontier and len(nodes) < max_nodes - 1:
        negative, _, path = heapq.heappop(frontier)
        nodes.append((path, -negative))
        for child in children.get(path, []):
            heapq.heappush(frontier, (-value[child], len(child), child))
    return nodes


def time_steps(
    backbone: Backbone,
    heads: MedusaHeads,
    nodes: list[tuple[Path_, float]],
    prompts: list[Prompt],
    answers: list[Decoded],
) -> Timing:
    """Time whole decoding steps over the best trees of several sizes, in turn, round by round."""
    sizes = [size for size in _SIZES if size <= len(nodes) + 1]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    plain: list[float] = []
    trees = {size: Tree.from_paths(path for path, _ in nodes[: size - 1]) for size in sizes}
    longest = max(range(len(answers)), key=lambda i: len(answers[i].tokens))
    prompt = prompts[longest].input_ids
    options: Any = {
        "max_new_tokens": min(_TIMING_TOKENS, backbone.max_length - len(prompt)),
        "stop_ids": (),  # every round takes the same number of tokens
    }
    for round_number in track(range(_TIMING_ROUNDS + 1), "timing steps"):
        plain_steps = decode_plain(backbone, prompt, **options).step_seconds
        for size, tree in trees.items():
            steps = decode_tree(backbone, heads, tree, prompt, **options).step_seconds
            if round_number:  # the first round warms up
                seconds[size] += steps[1:]
        if round_number:
            plain += plain_steps[1:]
    by_size = {size: median(seconds[size]) for size in sizes}
    return Timing(by_size, median(plain), fmean(answer.step_seconds[0] for answer in answers))


def choose(
    nodes: list[tuple[Path_, float]],
    timing: Timing,
    ranks_PK: np.ndarray,
    answers: list[Decoded],
) -> dict[str, Any]:
    """Return the calibration's record: the curve, the best size and its tree, the prediction."""
    expected = 1 + np.concatenate([[0.0], np.cumsum([share for _, share in nodes])])
    curve = [
        {
            "num_nodes": size,
            "tokens_per_step": float(expected[size - 1]),
            "step_seconds": seconds,
            "tokens_per_second": float(expected[size - 1] / seconds),
        }
        for size, seconds in timing.by_size.items()
    ]
    best = max(curve, key=lambda point: point["tokens_per_second"])
    size = int(best["num_nodes"])
    chosen = dict(nodes[: size - 1])
    tree = Tree.from_paths(chosen)
    new_tokens = fmean(len(answer.tokens) for answer in answers)
    plain = timing.prefill + (new_tokens - 1) * timing.plain
    ours = timing.prefill + (new_tokens - 1) / best["tokens_per_step"] * best["step_seconds"]
    steps = 1 + (new_tokens - 1) / best["tokens_per_step"]
    return {
        "num_positions": len(ranks_PK),
        "rank_share": [
            [float((ranks_K == rank).mean()) for rank in range(10)] for ranks_K in ranks_PK.T
        ],
        "curve": curve,
        "plain_step_seconds": timing.plain,
        "num_nodes": size,
        "tree": {"parents": list(tree.parents), "ranks": list(tree.ranks)},
        "node_probability": [1.0, *(chosen[path] for path in tree.paths[1:])],
        "predicted_tokens_per_step": new_tokens / steps,
        "predicted_speedup": plain / ours,
    }
