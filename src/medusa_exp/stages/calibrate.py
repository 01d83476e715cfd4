"""Stage calibrate: measure acceptance and step times, and choose the draft tree that is fastest.

1. The backbone responds to held-out prompts, as decoding will, greedily or at its temperature, and
   at each position we look up which draft token of each head is accepted (`decode/replay.py`).
   What counts is its own response, not the data's: that is what decoding verifies.
2. From these ranks the best tree of every size is grown, and its steps are counted
   (`tree/search.py`).
3. Steps over these trees are timed on this device (`time_steps`), and the size that should be
   fastest is tried on some whole responses beside those next to it (`rehearse`): the fastest wins.
   Where tokens are sampled, both kinds of drafts are tried (decode.draft=auto).
4. Nodes that are looked up in the text are tried beside the heads' where they save steps on these
   responses (tree.lookup=null).
5. Larger batches are timed too: the more rows, the fewer nodes pay, until none does.

K heads, P positions, C positions of a chunk, R ranks.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType

import numpy as np
import torch

from medusa_exp.config import Config, TreeConfig
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.lookup import count_found
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.replay import drawn_ranks
from medusa_exp.decode.rule import GREEDY
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import MedusaHeads, StackedHeads, from_head_places, heads_input
from medusa_exp.model.scoring import CHUNK, answer_ranks
from medusa_exp.runs.progress import track
from medusa_exp.stages.session import Session
from medusa_exp.tree.calibration import (
    Calibration,
    Curve,
    Timing,
    choose,
    correct,
    drawn_by,
    expected_seconds,
    faster,
    heads_sha256,
    save_calibration,
    summarize,
    without_dips,
    without_vain_lookup,
)
from medusa_exp.tree.search import best_tree, num_steps
from medusa_exp.tree.tree import Tree, chain

log = logging.getLogger(__name__)

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
_BATCHED_SIZES = (1, 2, 4, 8, 16, 32)
"""Sizes that are timed in batches of more than one."""
_ROUNDS, _TIMED_TOKENS = 4, 48
"""How often each tree decodes while steps are timed, and how many new tokens."""
_BATCHED_ROUNDS, _BATCHED_TOKENS = 2, 24
"""The same in batches, whose rounds take longer."""
_TIMING_SECONDS, _FEWEST_TOKENS = 60.0, 16
"""For which steps are timed, about; where they are slow, over fewer new tokens, but not below."""
_FEWEST_ROUNDS = 3
"""For trees of single prompts, where steps are slow: one that warms up, and two."""
_DOUBT = 1.5
"""By how much a step over a tree may be faster than it was timed to be, before it is left out."""
_REHEARSED_TREES, _REHEARSED_PROMPTS = 4, 12
"""Trees that may be the fastest, tried on so many whole responses."""
_LOOKUPS = (2, 4, 8, 16)
"""Looked-up nodes that are tried beside a tree of the heads."""
_TIMED_LOOKUPS, _LEAST_GAIN = 3, 1.03
"""Trees with such nodes that are timed, and by how much they make more tokens a step."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Measure, choose, and write `calibration.json` and `tree.json`."""
    session = session or Session(config, out)
    decoder = session.decoder(is_tree_known=False, is_measured=True)
    if config.decode.rule == "typical":  # whose responses are no draws of the model's
        decoder.rule = GREEDY
    heads = decoder.heads
    assert isinstance(heads, MedusaHeads | StackedHeads)
    prompts = _heldout_prompts(session, decoder)
    responses = [
        decoder.decode_plain([prompt], seed=config.seed + number)[0].tokens
        for number, prompt in enumerate(track(prompts, "responding to held-out prompts"))
    ]
    found = None
    if config.tree.lookup != 0 and not decoder.is_recurrent:
        at_most = heads.num_heads + max(_LOOKUPS[-1], config.tree.lookup or 0)
        found = [count_found(*pair, at_most) for pair in zip(prompts, responses, strict=True)]
    max_rank = min(config.tree.max_rank, heads.config.head_vocab_size)
    with_longest_response = prompts[int(np.argmax([len(response) for response in responses]))]
    sizes = sorted(set(config.tree.batch_sizes))
    ranks_of: dict[str, list[np.ndarray]] = {}
    curves_of: dict[str, list[Curve]] = {}
    largest: dict[str, Tree] = {}
    for draft in _drafts(config):
        decoder.rule = replace(decoder.rule, draft=draft)
        ranks = _ranks_of(session, decoder, prompts, responses, max_rank)
        trees = _trees_to_time(decoder, config.tree, ranks, max_rank)
        replayed = _Replayed(ranks, found if draft == "top" else None, config.tree.lookup)
        curves = [
            _at_batch_size(decoder, replayed, trees, with_longest_response, size) for size in sizes
        ]
        if curves[0].batch_size == 1:  # prompts are rehearsed one at a time
            curves[0] = _rehearsed(decoder, curves[0], prompts, replayed)
        curves = [without_vain_lookup(curve) for curve in curves]
        ranks_of[draft], curves_of[draft], largest[draft] = ranks, curves, trees[-1]
    chosen = [faster(list(of_size)) for of_size in zip(*curves_of.values(), strict=True)]
    calibration = summarize(
        chosen,
        ranks_of[chosen[0].draft],
        max_rank,
        choices=largest[min(largest, key=lambda draft: draft != "top")],
        heads_sha256=heads_sha256(out),
        drawn_by=drawn_by(config.decode),
        found=found,
    )
    save_calibration(calibration, out)
    if len(curves_of) > 1:
        log.info("tokens per second by decode.draft: %s", chosen[0].tokens_per_second)
    tree = session.tree(decoder)
    tree.save(out / "tree.json")
    looked_up = f", {tree.num_lookup} of them looked up" if tree.num_lookup else ""
    log.info("tree of %d nodes%s, depth %d", tree.num_checked, looked_up, tree.depth)
    return _metrics(calibration)


@dataclass(frozen=True)
class _Replayed:
    """What decoding the calibration's responses is replayed with."""

    ranks: list[np.ndarray]
    found: list[np.ndarray] | None
    """found_P of each response; None where nothing is to be looked up."""
    lookup: int | None
    """The config's wish: so many nodes, or as many as pay (None)."""

    def tokens_per_step(self, tree: Tree) -> float:
        return sum(map(len, self.ranks)) / num_steps(self.ranks, tree, self.found)

    def most_tokens_per_step(self, largest: Tree) -> float:
        """Return what no tree will exceed, with looked-up nodes or without."""
        can_be_wider = self.found is not None and self.lookup is None
        wider = replace(largest, num_lookup=_LOOKUPS[-1]) if can_be_wider else largest
        return self.tokens_per_step(wider)

    def with_lookup(self, timing: Timing) -> list[Tree]:
        """Return trees with looked-up nodes that should be fastest, by the times without."""
        if self.found is None or self.lookup is not None:
            return []
        alone = list(timing.by_tree)
        sizes, seconds = [len(tree) for tree in alone], list(timing.by_tree.values())
        expected: dict[Tree, float] = {}
        for tree in thinned(alone):
            least = _LEAST_GAIN * self.tokens_per_step(tree)
            for number in _LOOKUPS:
                wider = replace(tree, num_lookup=number)
                if wider.num_checked <= max(sizes) and self.tokens_per_step(wider) >= least:
                    guessed = float(np.interp(wider.num_checked, sizes, seconds))
                    timed = replace(timing, by_tree={wider: guessed})
                    expected[wider] = expected_seconds(self.ranks, wider, timed, self.found)
        return sorted(expected, key=lambda tree: expected[tree])[:_TIMED_LOOKUPS]


def _drafts(config: Config) -> list[str]:
    """Return the kinds of drafts to try."""
    decode, tree = config.decode, config.tree
    if decode.rule != "sampling" or decode.draft == "top" or tree.kind == "dynamic":
        return ["top"]
    can_be_drawn = not tree.lookup  # see `check_draft`
    return ["sampled"] if decode.draft == "sampled" else ["top", "sampled"][: 1 + can_be_drawn]


def _trees_to_time(
    decoder: Decoder, settings: TreeConfig, ranks: list[np.ndarray], max_rank: int
) -> list[Tree]:
    """Return trees of some sizes, the smallest first, for the drafts that the decoder's rule makes.

    With as many looked-up nodes as tree.lookup says, if it does.
    """
    is_drawn = decoder.rule.draft == "sampled"
    if decoder.is_recurrent:
        deepest = min(ranks[0].shape[1], settings.max_nodes - 1)
        trees = [chain(depth) for depth in range(deepest + 1)]
    else:
        trees = grown_trees(ranks, settings.max_nodes, max_rank, is_drawn=is_drawn)
    if settings.lookup and not is_drawn:
        return [replace(tree, num_lookup=settings.lookup) for tree in trees]
    return trees


def _ranks_of(
    session: Session,
    decoder: Decoder,
    prompts: list[list[int]],
    responses: list[list[int]],
    max_rank: int,
) -> list[np.ndarray]:
    """Return ranks_PK of each response, of the drafts that the decoder's rule makes."""
    backbone, heads, rule = decoder.backbone, decoder.heads, decoder.rule
    assert isinstance(heads, MedusaHeads | StackedHeads)
    pairs = list(zip(prompts, responses, strict=True))
    if rule.draft == "top":
        return [head_ranks(backbone, heads, *pair, max_rank) for pair in pairs]
    unstacked = load_heads(session.out / "heads", backbone)
    found = []
    for number, (prompt, response) in enumerate(track(pairs, "replaying draws")):
        ids_1T = torch.tensor([prompt + response], device=backbone.device)
        with torch.inference_mode():
            hidden_TD = backbone.hidden_states(ids_1T)[0, :-1]
            of_prompt = replace(rule, seed=(rule.seed or 0) + number)
            tokens_P = ids_1T[0, len(prompt) :]
            found.append(drawn_ranks(backbone, unstacked, tokens_P, hidden_TD, of_prompt, max_rank))
    return found


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
    root_P = ids[len(prompt_ids) :]
    if isinstance(heads, MedusaHeads) and heads.is_sequential:
        return answer_ranks(heads, root_P, hidden_PD, max_rank)
    response = torch.cat([root_P, ids.new_full((num_heads,), -1)])
    truth_PK = response.unfold(0, num_heads + 1, 1)[:, 1:]
    rank_R = torch.arange(max_rank, device=ids.device)
    found = []
    chunks = zip(*(part.split(CHUNK) for part in (hidden_PD, root_P, truth_PK)), strict=True)
    for hidden_CD, root_C, truth_CK in chunks:
        logits_CKW = heads(hidden_CD.to(heads.dtype), None, root_C, in_head_vocab=True)
        draft_CKR = from_head_places(heads, logits_CKW.topk(max_rank, dim=-1).indices)
        is_true_CKR = draft_CKR == truth_CK[..., None]
        found.append(torch.where(is_true_CKR, rank_R, max_rank).amin(-1))
    return torch.cat(found).cpu().numpy()


def grown_trees(
    ranks: list[np.ndarray], max_nodes: int, max_rank: int, *, is_drawn: bool
) -> list[Tree]:
    """Return the best tree of each of some sizes, the smallest first; see `best_tree`."""
    sizes = [*(size for size in _SIZES if size < max_nodes), max_nodes]
    return list(
        dict.fromkeys(best_tree(ranks, size, max_rank, is_drawn=is_drawn) for size in sizes)
    )


def thinned(trees: list[Tree]) -> list[Tree]:
    """Return fewer of these trees: for each of some sizes the largest that has no more nodes."""
    fitting = [[tree for tree in trees if len(tree) <= size] for size in _BATCHED_SIZES]
    return list(dict.fromkeys(max(some, key=len) for some in fitting if some))


def _heldout_prompts(session: Session, decoder: Decoder) -> list[list[int]]:
    assert decoder.tokenizer is not None
    wanted = session.config.tree.num_prompts
    prompts = session.prompts("val", decoder.backbone, decoder.tokenizer, wanted)
    return [prompt.input_ids for prompt in prompts]


def time_steps(
    decoder: Decoder,
    trees: Sequence[Tree],
    prompt: list[int],
    *,
    batch_size: int,
    rounds: int,
    new_tokens: int,
    tokens_per_step: Mapping[Tree, float] = MappingProxyType({}),
    most_tokens: float = math.inf,
    what: str = "timing steps",
) -> Timing:
    """Time whole decoding steps over several trees, in turn, round by round.

    Every row of the batch is the same prompt, so that all rows end together. Large models' steps
    are slow, and differ less: they are timed over fewer tokens than `new_tokens`, then in fewer
    rounds.

    Args:
        decoder: with the heads that the trees are for.
        trees: the smallest first.
        prompt: what is decoded.
        batch_size: rows of a step.
        rounds: how often each tree decodes, after one round that warms up.
        new_tokens: of a row in each round.
        tokens_per_step: what each tree gives. Where they are told, trees are left out from the
            first on that is too slow to become the fastest, by the first round.
        most_tokens: what a step can give at most, over whatever tree.
        what: the bar's words.
    """
    seconds: dict[Tree, list[float]] = {tree: [] for tree in trees}
    plain: list[float] = []
    prefill: list[float] = []
    # Without stop ids: every round takes the same number of tokens.
    room = decoder.backbone.max_length_from(len(prompt)) - len(prompt)
    new_tokens = max(2, min(new_tokens, room))  # a step after the prompt's, at least
    prompts = [prompt] * batch_size
    some = decoder.decode_plain(prompts, Limits(min(new_tokens, _FEWEST_TOKENS)))[0]
    in_turn = batch_size if decoder.is_recurrent else 1
    # As if each tree gave one token a step, for steps over trees take longer than plain ones.
    of_round = (len(trees) + 1) * in_turn * median(some.step_seconds[1:])  # for each token
    enough = round(_TIMING_SECONDS / (rounds + 1) / of_round)
    limits = Limits(min(new_tokens, max(_FEWEST_TOKENS, enough)))
    enough = round(_TIMING_SECONDS / of_round / limits.max_new_tokens)
    num_rounds = min(rounds + 1, max(_FEWEST_ROUNDS if batch_size == 1 else 2, enough))
    turns = [(number, tree) for number in range(num_rounds) for tree in (None, *trees)]
    plain_seconds, fastest = math.inf, 1.0
    for number, tree in track(turns, f"{what}, {batch_size} at a time"):
        if tree is None:
            response = decoder.decode_plain(prompts, limits)[0]
            if number == 0:
                plain_seconds = median(response.step_seconds[1:])
            else:
                plain += response.step_seconds[1:]
        elif tree in seconds:
            response = decoder.decode(prompts, limits, tree=tree)[0]
            if number == 0:
                factor = median(response.step_seconds[1:]) / plain_seconds
                fastest = max(fastest, tokens_per_step.get(tree, 0.0) / factor)
                if most_tokens / factor * _DOUBT < fastest:
                    seconds = {t: seconds[t] for t in trees[: max(1, trees.index(tree))]}
            else:
                seconds[tree] += response.step_seconds[1:]
                prefill.append(response.step_seconds[0])
    by_tree = {tree: median(taken) for tree, taken in seconds.items()}
    return Timing(batch_size, by_tree, median(plain), median(prefill))


def rehearse(
    decoder: Decoder, trees: Sequence[Tree], prompts: list[list[int]]
) -> tuple[dict[Tree | None, float], dict[Tree | None, int]]:
    """Decode prompts over each tree and plainly (None), in turn; return seconds and steps of each.

    Steps that are timed alone are warm; a whole response has cold ones, and much that is no step.
    Steps of fixed shapes are captured at their first call for prompts of about a length. That
    happens once, and is no part of a response: there each is decoded twice, and the second counts.
    """
    ways: list[Tree | None] = [None, *trees]
    seconds, steps = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    for number, prompt in enumerate(track(prompts, "rehearsing")):
        first = number % len(ways)  # who begins changes: the first pays for what is cold
        for way in ways[first:] + ways[:first]:
            if decoder.uses_fixed_shapes:
                _respond(decoder, prompt, way)
            start = time.perf_counter()
            num_steps_taken = _respond(decoder, prompt, way)
            # It ends with tokens on the host: nothing is left to wait for.
            seconds[way] += time.perf_counter() - start
            steps[way] += num_steps_taken
    return seconds, steps


def _respond(decoder: Decoder, prompt: list[int], tree: Tree | None) -> int:
    """Return the steps that it took."""
    if tree is None:
        [response] = decoder.decode_plain([prompt])
    else:
        [response] = decoder.decode([prompt], tree=tree)
    return len(response.accept_lengths)


def _at_batch_size(
    decoder: Decoder,
    replayed: _Replayed,
    trees: list[Tree],
    prompt: list[int],
    batch_size: int,
) -> Curve:
    """Time steps of so many rows and return `choose`'s findings."""
    rounds, new_tokens = _ROUNDS, _TIMED_TOKENS
    if batch_size > 1:
        rounds, new_tokens = _BATCHED_ROUNDS, _BATCHED_TOKENS
        trees = thinned(trees)
    tokens_per_step = {tree: replayed.tokens_per_step(tree) for tree in trees}
    most_tokens = max(*tokens_per_step.values(), replayed.most_tokens_per_step(trees[-1]))

    time_over = partial(
        time_steps,
        decoder,
        prompt=prompt,
        batch_size=batch_size,
        rounds=rounds,
        new_tokens=new_tokens,
    )
    timing = time_over(
        trees,
        tokens_per_step=tokens_per_step,
        most_tokens=most_tokens,
        what=f"timing steps{' of draws' if decoder.rule.draft == 'sampled' else ''}",
    )
    timing = without_dips(timing)
    untimed = [tree for tree in trees if tree not in timing.by_tree]
    if untimed:
        most = max(timing.by_tree, key=len)
        log.info("%d at a time, more than %d nodes are too slow to pay", batch_size, len(most))
    if wider := replayed.with_lookup(timing):
        later = without_dips(time_over(wider, what="timing looked-up nodes"))
        clock = timing.plain / later.plain  # the machine may be slower now
        timed = {tree: seconds * clock for tree, seconds in later.by_tree.items()}
        timing = replace(timing, by_tree=timing.by_tree | timed)
    found = choose(replayed.ranks, timing, replayed.found)
    return replace(found, draft=decoder.rule.draft, untimed=untimed)


def _rehearsed(
    decoder: Decoder, curve: Curve, prompts: list[list[int]], replayed: _Replayed
) -> Curve:
    """Decode some prompts over the trees that may be the fastest; return what is then to be chosen.

    Args:
        decoder: with the heads that the trees are for.
        curve: of `choose`, for batch size 1.
        prompts: of which the first few are decoded.
        replayed: of the responses to all prompts.
    """
    trees = curve.promising(_REHEARSED_TREES)
    if all(tree.num_lookup for tree in trees) and replayed.lookup is None:
        trees.append(curve.without_lookup())  # looking up has to be faster than this
    rehearsed = replayed.ranks[:_REHEARSED_PROMPTS]
    found = replayed.found and replayed.found[:_REHEARSED_PROMPTS]
    seconds, steps = rehearse(decoder, trees, prompts[:_REHEARSED_PROMPTS])
    # Other draws, other responses: what a step took counts. Of sampled drafts the replay counts too
    # many steps, by less than a few prompts can tell: likeliest ones are favoured by that.
    if decoder.rule.name == "sampling":
        expected = {tree: num_steps(rehearsed, tree or chain(0), found) for tree in seconds}
        seconds = {tree: took * expected[tree] / steps[tree] for tree, took in seconds.items()}
    return correct(curve, seconds, rehearsed, found)


def _metrics(calibration: Calibration) -> dict[str, float]:
    """Return what the stage found; say so where it is that no tree pays."""
    if calibration.predicted_speedup < 1 or calibration.num_nodes == 1:
        # Of one node it is plain decoding, whose factor would tell of noise alone.
        is_plain, predicted = calibration.num_nodes == 1, calibration.predicted_speedup
        kept = f"The fastest that was tried is kept, of {calibration.num_nodes} nodes"
        log.warning(
            "no tree is expected to pay here%s: too few draft tokens of the heads are accepted "
            "(see val/top1_head1), or a step on this device costs too much for what is. %s",
            "" if is_plain else f" ({predicted:.2f}x)",
            "The tree has one node: plain decoding" if is_plain else kept,
        )
    elif calibration.tree.depth == 0:
        log.warning(
            "the heads guess too badly to be used here (see val/top1_head1): only text that is "
            "looked up is drafted"
        )
    names = ["num_nodes", "predicted_tokens_per_step", "predicted_speedup"]
    if calibration.break_even_batch_size is not None:
        names.append("break_even_batch_size")
    return {f"calibrate/{name}": float(getattr(calibration, name)) for name in names}
