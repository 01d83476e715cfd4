import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medusa_exp.config import DecodeConfig, TreeConfig
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.lookup import count_found
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads
from medusa_exp.stages import calibrate
from medusa_exp.stages.calibrate import head_ranks, thinned
from medusa_exp.tree import Tree, chain
from medusa_exp.tree.calibration import (
    Timing,
    choose,
    choose_tree,
    correct,
    draft_of,
    drawn_by,
    expected_seconds,
    faster,
    save_calibration,
    summarize,
    without_dips,
)
from medusa_exp.tree.search import best_tree, grow, node_shares, num_steps, prefix_counts, replay


def test_prefix_counts_are_joint():
    ranks_PK = np.array([[0, 0], [0, 1], [1, 0], [5, 0]])
    expected = {(0,): 2, (0, 0): 1, (0, 1): 1, (1,): 1, (1, 0): 1}
    assert prefix_counts(ranks_PK, max_rank=2) == Counter(expected)


@pytest.mark.parametrize("seed", range(20))
def test_grown_trees_are_the_best_of_every_size(seed):
    """Against exhaustive search over all prefix-closed sets of nodes."""
    rng = np.random.default_rng(seed)
    value = prefix_counts(rng.integers(0, 3, size=(12, 3)), max_rank=2)
    grown = grow(value, max_nodes=100)
    assert len(grown) == len(value)
    for size in range(1, min(6, len(value))):
        best = max(
            sum(value[path] for path in chosen)
            for chosen in combinations(value, size)
            if all(path[:-1] in {(), *chosen} for path in chosen)
        )
        assert sum(value[path] for path in grown[:size]) == best


def test_batches_are_timed_over_the_largest_tree_up_to_each_of_some_sizes():
    trees = [chain(n - 1) for n in (1, 2, 3, 5, 12, 24)]
    assert [len(tree) for tree in thinned(trees)] == [1, 2, 3, 5, 12, 24]
    assert [len(tree) for tree in thinned(trees[1:4])] == [2, 3, 5]


def test_replay_by_hand():
    """Token 0 is certain; (0, 0) comes true there, then nothing at 3, then (0,) at 4."""
    ranks_PK = np.array([[0, 0], [9, 9], [9, 9], [9, 9], [0, 9], [9, 9], [9, 9]])
    assert replay(ranks_PK, chain(2)) == [0, 3, 4]
    assert replay(ranks_PK, chain(1)) == [0, 2, 3, 4]
    assert num_steps([ranks_PK], chain(0)) == 7
    assert node_shares([ranks_PK], chain(2)) == pytest.approx([1, 2 / 3, 1 / 3])


def test_replay_counts_the_steps_that_decoding_takes(backbone):
    """The prediction of tokens per step is exact on the answers that it was made from."""
    rng = random.Random(0)
    tree = Tree.from_paths([[0], [0, 0], [1], [2], [1, 0], [0, 0, 0], [3], [0, 1]])
    heads = build_heads(backbone, num_heads=3)
    decoder = Decoder(backbone, heads, tree)
    for _ in range(6):
        prompt = [rng.randrange(64) for _ in range(rng.randint(1, 20))]
        limits = Limits(rng.randint(1, 60), {7})
        [plain] = decode_plain(backbone, [prompt], limits)
        ranks_PK = head_ranks(backbone, heads, prompt, plain.tokens, max_rank=5)
        [ours] = decoder.decode([prompt], limits)
        assert num_steps([ranks_PK], tree) == len(ours.accept_lengths)


def test_counting_where_decoding_stands_finds_a_better_tree():
    """At positions that are jumped over, guesses of rank 1 come true; where it stands, rank 2."""
    block = [[0, 0], [1, 99], [1, 99], [2, 99], [99, 99]]
    answer = np.array(block * 30)
    naive = Tree.from_paths(grow(prefix_counts(answer, 10), 4))
    assert num_steps([answer], best_tree([answer], 4, 10)) < num_steps([answer], naive)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [256, 3])
def test_head_ranks_by_hand(backbone, chunk, monkeypatch):
    """Heads start as the lm_head, so head k ranks by the backbone's logits at the same place."""
    monkeypatch.setattr(calibrate, "CHUNK", chunk)
    heads = build_heads(backbone, num_heads=2)
    prompt, answer = [1, 2, 3], [10, 11, 12, 13]
    logits_TV = backbone.model(torch.tensor([prompt + answer])).logits[0]
    ranks_PK = head_ranks(backbone, heads, prompt, answer, max_rank=64)
    assert ranks_PK.shape == (4, 2)
    for position, truth in enumerate([[11, 12], [12, 13], [13, None], [None, None]]):
        row = logits_TV[len(prompt) - 1 + position]
        expected = [64 if t is None else int((row > row[t]).sum()) for t in truth]
        assert ranks_PK[position].tolist() == expected


def test_the_fastest_tree_is_chosen_not_the_one_with_most_tokens():
    answers = [np.zeros((21, 2), dtype=int)]
    times = {chain(0): 1.0, chain(1): 1.2, chain(2): 2.5}
    chosen = choose(answers, Timing(1, times, plain=1.0, prefill=3.0))
    assert chosen.num_nodes == 2
    assert chosen.predicted_tokens_per_step == pytest.approx(21 / 11)
    assert chosen.predicted_speedup == pytest.approx((3 + 20) / (3 + 10 * 1.2))
    assert [point.num_nodes for point in chosen.curve] == [1, 2, 3]


def test_steps_over_more_nodes_are_never_timed_as_faster():
    trees = [chain(depth) for depth in range(5)]  # of 1 to 5 nodes
    seconds = [1.0, 1.4, 1.9, 1.2, 2.5]  # the third met a busy machine
    timing = Timing(1, dict(zip(reversed(trees), reversed(seconds), strict=True)), 1.0, 3.0)
    ordered = without_dips(timing)
    assert [ordered.by_tree[tree] for tree in trees] == pytest.approx([1.0, 1.4, 1.55, 1.55, 2.5])
    assert list(ordered.by_tree) == list(timing.by_tree)
    assert (ordered.plain, ordered.prefill) == (1.0, 3.0)
    assert without_dips(ordered).by_tree == pytest.approx(ordered.by_tree)  # nothing is left
    # Five nodes of heads that draft in turn take longer than two, and nodes that are looked up.
    times = {replace(chain(4), num_lookup=4): 2.0, replace(chain(1), num_lookup=8): 1.5}
    assert without_dips(Timing(1, times, 1.0, 3.0)).by_tree == times


def test_a_tree_of_one_node_promises_nothing():
    """It decodes plainly, however much faster than plain decoding the clock has seen it."""
    answers = [np.full((21, 2), 99)]
    curves = [
        choose(answers, Timing(size, {chain(0): 0.8, chain(1): 1.2}, plain=1.0, prefill=3.0))
        for size in (1, 4)
    ]
    assert [(curve.num_nodes, curve.predicted_speedup) for curve in curves] == [(1, 1.0)] * 2
    calibration = summarize(curves, answers, 99, choices=chain(1), heads_sha256="")
    assert calibration.break_even_batch_size == 1


def test_a_rehearsal_outweighs_what_was_expected():
    """Two guesses looked faster; answers over one guess took less."""
    answers = [np.zeros((21, 2), dtype=int)] * 2
    times = {chain(0): 1.0, chain(1): 1.2, chain(2): 1.3}
    curve = choose(answers, Timing(1, times, plain=1.0, prefill=3.0))
    assert curve.num_nodes == 3
    rehearsed = {None: 46.0, chain(1): 24.0, chain(2): 30.0}  # of the first answer alone
    curve = correct(curve, rehearsed, answers[:1])
    assert curve.num_nodes == 2
    assert curve.predicted_speedup == pytest.approx(46 / 24)


def test_trees_that_were_not_rehearsed_are_corrected_as_the_others_were():
    """Whole answers took twice what steps alone promise: no estimate looks better for that."""
    answers = [np.zeros((21, 5), dtype=int)] * 2
    seconds = dict(zip(map(chain, range(6)), (1.0, 1.2, 1.3, 1.4, 1.5, 1.6), strict=True))
    timing = Timing(1, seconds, plain=1.0, prefill=3.0)
    before = choose(answers, timing)
    factor = {None: 1.5, chain(5): 2.2, chain(4): 1.9, chain(2): 2.0}
    took = {tree: f * expected_seconds(answers, tree, timing) for tree, f in factor.items()}
    after = correct(before, took, answers)
    assert after.tree == chain(4)
    pairs = list(zip(before.curve, after.curve, strict=True))
    assert [new.tree for _, new in pairs if new.is_rehearsed] == [chain(2), chain(4), chain(5)]
    for old, new in pairs:  # the median is of the trees, and not of plain decoding
        assert new.expected_seconds / old.expected_seconds == pytest.approx(
            factor.get(new.tree, 2.0)
        )
        assert new.tokens_per_second * new.expected_seconds == pytest.approx(42)
        assert new.step_seconds == old.step_seconds
        chosen = before.plain_expected_seconds * 1.5 / after.predicted_speedup
        assert chosen <= new.expected_seconds


def test_without_looked_up_nodes_the_fastest_is_one_that_was_rehearsed(tmp_path, monkeypatch):
    """An estimate of another tree, however good, has not been held against whole answers."""
    ranks, found = [np.full((18, 1), 99)], [np.arange(17, -1, -1)]
    wider = replace(chain(0), num_lookup=16)
    timing = Timing(1, {chain(0): 1.0, chain(1): 1.1, wider: 1.2}, plain=1.0, prefill=1.0)
    took = {None: 18.0, wider: 2.2, chain(1): 30.0}
    curve = correct(choose(ranks, timing, found), took, ranks, found)
    assert curve.tree == wider
    points = {point.tree: point for point in curve.curve}
    assert points[chain(0)].tokens_per_second > points[chain(1)].tokens_per_second
    assert curve.without_lookup() == chain(1)
    calibration = summarize([curve], ranks, 9, choices=chain(1), heads_sha256="x", found=found)
    save_calibration(calibration, tmp_path)
    monkeypatch.setattr("medusa_exp.tree.calibration.heads_sha256", lambda out: "x")
    assert choose_tree(TreeConfig(lookup=0), tmp_path, num_heads=1) == chain(1)


def test_neighbours_of_the_tree_that_should_be_fastest_are_rehearsed():
    """Steps were timed of each alone; one node less or more may do better, whatever came out."""
    answers = [np.zeros((21, 4), dtype=int)]
    seconds = {4: 1.0, 3: 2.0, 2: 1.2, 1: 0.3, 0: 0.2}  # by depth
    curve = choose(answers, Timing(1, {chain(k): t for k, t in seconds.items()}, 1.0, 3.0))
    by_speed = [point.num_nodes for point in curve.fastest()]
    assert by_speed == [2, 5, 1, 3, 4]
    assert [len(tree) for tree in curve.promising(4)] == [2, 1, 3, 5]
    assert [len(tree) for tree in curve.promising(9)] == [2, 1, 3, 5, 4]
    looked_up = {replace(chain(1), num_lookup=4): 0.1, replace(chain(1), num_lookup=2): 0.2}
    points = choose(answers, Timing(1, looked_up, 1.0, 3.0)).curve
    trees = replace(curve, with_lookup=points).promising(3)
    assert [(len(tree), tree.num_lookup) for tree in trees] == [(2, 4), (2, 2), (2, 0)]


def test_the_batch_size_at_which_no_tree_pays():
    answers = [np.zeros((21, 2), dtype=int)]

    def curve(batch_size: int, seconds: float):
        times = {chain(0): 1.1, chain(1): seconds}
        return choose(answers, Timing(batch_size, times, plain=1.0, prefill=3.0))

    curves = [curve(1, 1.2), curve(4, 1.6), curve(16, 4.0), curve(32, 5.0)]
    other = {"choices": chain(2), "heads_sha256": "1234"}
    found = summarize(curves, answers, max_rank=3, **other)
    assert found.break_even_batch_size == 16
    assert [curve.num_nodes for curve in found.batch_sizes] == [2, 2, 1, 1]
    assert [found.of_batch_size(n).batch_size for n in (1, 3, 4, 99)] == [1, 1, 4, 32]
    assert found.num_nodes == 2 and found.rank_share == [[1.0, 0.0, 0.0]] * 2
    assert summarize(curves[:2], answers, 3, **other).break_even_batch_size is None


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
def test_captures_are_no_part_of_a_rehearsal(monkeypatch, has_fixed_shapes):
    """A graph takes long at its first call for prompts of a length, and never again."""
    clock, captured = [0.0], set()

    def respond(prompts, tree=None):
        [prompt] = prompts
        shape = tree, len(prompt) > 2
        if has_fixed_shapes and shape not in captured:
            captured.add(shape)
            clock[0] += 100
        clock[0] += 5 if tree is None else 2
        return [SimpleNamespace(accept_lengths=[1] * len(prompt))]

    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    decoder = SimpleNamespace(
        uses_fixed_shapes=has_fixed_shapes, decode=respond, decode_plain=respond
    )
    found, steps = calibrate.rehearse(decoder, [chain(1)], [[1], [1, 2, 3], [1, 2, 3, 4]])
    assert found == {None: 15.0, chain(1): 6.0}
    assert steps == {None: 8, chain(1): 8}


def decoder_of(respond, is_recurrent=False):
    return SimpleNamespace(
        backbone=SimpleNamespace(max_length_from=lambda length: 1000),
        decode_plain=respond,
        decode=respond,
        is_recurrent=is_recurrent,
    )


@pytest.mark.parametrize(
    ("step_seconds", "is_recurrent", "expected"),
    [(0.003, False, 48), (0.05, False, 24), (5.0, False, 16), (0.0125, True, 24)],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_slow_steps_are_timed_over_fewer_tokens(step_seconds, is_recurrent, expected, batch_size):
    """A recurrent model answers the rows one after the other."""
    if is_recurrent:
        step_seconds *= 4 / batch_size
    asked = []

    def respond(prompts, limits, tree=None):
        asked.append(limits.max_new_tokens)
        seconds = [1.0] + [step_seconds] * (asked[-1] - 1)
        return [SimpleNamespace(step_seconds=seconds) for _ in prompts]

    decoder = decoder_of(respond, is_recurrent)
    trees = [chain(depth) for depth in range(9)]
    found = calibrate.time_steps(
        decoder, trees, [1], batch_size=batch_size, rounds=4, new_tokens=48, what="timing"
    )
    # Rounds of 9 trees and of plain decoding; where steps take seconds, no more than it needs.
    rounds = 5 if step_seconds < 1 else 3 if batch_size == 1 else 2
    assert asked == [16] + rounds * 10 * [expected]
    assert found.plain == found.by_tree[trees[3]] == step_seconds


@pytest.mark.parametrize(
    ("factor", "most_tokens", "num_timed"),
    [
        (1.0, 2.0, 9),
        (1.5, 2.0, 3),  # 1.5 ** 3 is more than 2 * 1.5: too slow, if timed by half too slow
        (1.5, 9.0, 7),
        (20.0, 2.0, 1),
    ],
)
def test_trees_that_cannot_pay_are_not_timed_to_the_end(factor, most_tokens, num_timed):
    decoded = []

    def respond(prompts, limits, tree=None):
        decoded.append(tree)
        seconds = factor ** (0 if tree is None else tree.depth)
        return [SimpleNamespace(step_seconds=[seconds] * limits.max_new_tokens) for _ in prompts]

    decoder = decoder_of(respond)
    trees = [chain(depth) for depth in range(9)]
    tokens = dict.fromkeys(trees, 1.0)
    found = calibrate.time_steps(
        decoder,
        trees,
        [1],
        batch_size=4,
        rounds=4,
        new_tokens=48,
        tokens_per_step=tokens,
        most_tokens=most_tokens,
    )
    assert list(found.by_tree) == trees[:num_timed]
    # The first one that is too slow shows it in one round, and those after it are left alone.
    assert {tree: decoded.count(tree) for tree in trees} == {
        tree: 2 if n < num_timed else int(n == max(1, num_timed)) for n, tree in enumerate(trees)
    }


def test_a_larger_tree_than_was_timed_can_be_asked_for():
    curve = choose([np.full((21, 2), 0)], Timing(1, {chain(0): 1.0}, plain=1.0, prefill=1.0))
    curve = replace(curve, untimed=[chain(1), chain(4)])
    assert [len(curve.up_to(nodes)) for nodes in (1, 2, 4, 5, 64)] == [1, 2, 2, 5, 5]


def test_trees_of_draws_have_no_gap():
    """A child is tried after its elder siblings, however much likelier it is to be accepted."""
    value = Counter({(2,): 9, (1,): 3, (0,): 4, (2, 0): 5, (0, 1): 2})
    assert grow(value, 9, is_drawn=True) == [(0,), (1,), (2,), (2, 0)]


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({"draft": "auto"}, "calibrated", "sampled"),
        ({"draft": "auto", "temperature": 0.7}, "calibrated", "top"),
        ({"draft": "auto", "verifier": "cupy"}, "calibrated", "sampled"),
        ({"draft": "auto"}, "chain", "top"),
        ({"draft": "top"}, "calibrated", "top"),
        ({"draft": "sampled"}, "chain", "sampled"),
        ({"rule": "greedy"}, "calibrated", "top"),
    ],
)
def test_what_is_drafted_is_what_was_faster_at_this_temperature(
    tmp_path, monkeypatch, settings, kind, expected
):
    ranks = [np.array([[0, 9], [0, 9], [9, 9]])]
    curves = [
        replace(choose(ranks, Timing(1, {chain(1): seconds}, 1.0, 1.0)), draft=draft)
        for draft, seconds in (("top", 2.0), ("sampled", 1.5))
    ]
    best = faster(curves)
    assert best.draft == "sampled" and best.tokens_per_second.keys() == {"top", "sampled"}
    made_by = drawn_by(DecodeConfig(rule="sampling"))
    calibration = summarize([best], ranks, 9, choices=chain(1), heads_sha256="x", drawn_by=made_by)
    save_calibration(calibration, tmp_path)
    monkeypatch.setattr("medusa_exp.tree.calibration.heads_sha256", lambda out: "x")
    decode = DecodeConfig(**{"rule": "sampling", **settings})
    assert draft_of(decode, TreeConfig(kind=kind), tmp_path) == expected
    looked_up = draft_of(decode, TreeConfig(kind=kind, lookup=2), tmp_path)
    assert looked_up == (expected if decode.draft == "sampled" else "top")


def test_replay_with_lookup_counts_the_steps_that_decoding_takes(backbone):
    """Text that goes in circles, heads that guess badly, and trees of several shapes."""
    rng = random.Random(0)
    heads = build_heads(backbone, num_heads=3)
    trees = [chain(0), chain(2), Tree.from_paths([[0], [0, 0], [1], [2], [1, 0], [0, 0, 0], [3]])]
    saved = 0
    for number in range(9):
        prompt = [rng.randrange(64) for _ in range(6)] * 3
        limits = Limits(rng.randint(20, 60), {7})
        [plain] = decode_plain(backbone, [prompt], limits)
        ranks_PK = head_ranks(backbone, heads, prompt, plain.tokens, max_rank=5)
        tree = replace(trees[number % 3], num_lookup=rng.randint(1, 6))
        found_P = count_found(prompt, plain.tokens, 9)
        [ours] = Decoder(backbone, heads, tree).decode([prompt], limits)
        assert ours.tokens == plain.tokens
        assert num_steps([ranks_PK], tree, [found_P]) == len(ours.accept_lengths)
        saved += num_steps([ranks_PK], trees[number % 3]) - len(ours.accept_lengths)
    assert saved > 0


def test_what_is_found_by_hand():
    """After the response's 1 the text said 2 3 9; after its 2 it said 3 9."""
    assert count_found([1, 2, 3, 9], [1, 2, 3, 4, 5], 8).tolist() == [2, 1, 0, 0, 0]
    assert count_found([1, 2, 3, 9], [1, 2, 3, 4, 5], 1).tolist() == [1, 1, 0, 0, 0]
    assert count_found([8], [5, 5, 5, 5], 8).tolist() == [3, 2, 1, 0]


def test_looked_up_nodes_are_chosen_where_they_pay_and_only_there(tmp_path, monkeypatch):
    """One answer that the text had before: two steps over sixteen nodes, if these cost little."""
    ranks, found = [np.full((18, 1), 99)], [np.arange(17, -1, -1)]
    alone, wider = chain(1), replace(chain(1), num_lookup=16)
    monkeypatch.setattr("medusa_exp.tree.calibration.heads_sha256", lambda out: "x")
    for seconds, num_lookup in ((3.0, 16), (20.0, 0)):
        times = Timing(1, {chain(0): 1.0, alone: 1.1, wider: seconds}, plain=1.0, prefill=1.0)
        curve = choose(ranks, times, found)
        assert [point.num_nodes for point in curve.curve] == [1, 2]
        assert [point.num_nodes for point in curve.with_lookup] == [18]
        calibration = summarize([curve], ranks, 9, choices=chain(1), heads_sha256="x")
        save_calibration(calibration, tmp_path)
        chosen = choose_tree(TreeConfig(), tmp_path, num_heads=1)
        assert chosen.num_lookup == num_lookup
        assert choose_tree(TreeConfig(lookup=0), tmp_path, num_heads=1) == chain(0)
        assert choose_tree(TreeConfig(lookup=3), tmp_path, num_heads=1).num_lookup == 3
        rehearsed = correct(curve, {None: 36.0, wider: 2.0, chain(0): 35.0}, ranks, found)
        assert rehearsed.tree == wider and rehearsed.predicted_speedup == pytest.approx(18.0)


def test_looked_up_nodes_that_cost_more_than_they_save_are_not_kept(caplog):
    """They look faster than the heads' trees, and slower than plain decoding."""
    ranks, found = [np.full((18, 1), 99)], [np.array([1] * 9 + [0] * 9)]
    wider = replace(chain(0), num_lookup=4)
    for seconds, said in (
        (0.9, "only text that is looked up is drafted"),
        (2.0, "one node: plain"),
    ):
        times = Timing(1, {chain(0): 1.5, chain(1): 1.6, wider: seconds}, plain=1.0, prefill=1.0)
        curve = choose(ranks, times, found)
        assert curve.tree == wider and curve.predicted_speedup == pytest.approx(
            18 / (1 + (num_steps(ranks, wider, found) - 1) * seconds)
        )
        kept = calibrate.without_vain_lookup(curve)
        assert kept.tree == (wider if curve.predicted_speedup >= 1 else chain(0))
        assert kept.num_nodes == kept.tree.num_checked
        asked_for = replace(curve, with_lookup=[])  # by tree.lookup=4
        assert calibrate.without_vain_lookup(asked_for).tree == wider
        calibration = summarize([kept], ranks, 9, choices=chain(1), heads_sha256="x", found=found)
        assert calibrate._metrics(calibration)["calibrate/num_nodes"] == kept.num_nodes
        assert said in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("num_nodes", "said"), [(1, "pay here: too few"), (3, "here (0.80x): too")]
)
def test_no_factor_is_told_of_plain_decoding(num_nodes, said, caplog):
    numbers = {"predicted_tokens_per_step": 1.0, "break_even_batch_size": None}
    predicted = 1.7 if num_nodes == 1 else 0.8
    calibrate._metrics(SimpleNamespace(num_nodes=num_nodes, predicted_speedup=predicted, **numbers))
    assert said in caplog.text


def test_num_nodes_counts_those_of_the_heads(tmp_path, monkeypatch):
    """Of tree.lookup=8 every tree that was timed has more nodes than tree.num_nodes=1 or 2."""
    ranks, found = [np.full((18, 1), 99)], [np.arange(17, -1, -1)]
    trees = [replace(chain(depth), num_lookup=8) for depth in (0, 1)]
    timing = Timing(1, dict.fromkeys(trees, 1.0), plain=1.0, prefill=1.0)
    curve = choose(ranks, timing, found)
    calibration = summarize([curve], ranks, 9, choices=trees[1], heads_sha256="x", found=found)
    save_calibration(calibration, tmp_path)
    monkeypatch.setattr("medusa_exp.tree.calibration.heads_sha256", lambda out: "x")
    for num_nodes, depth in ((1, 0), (2, 1), (9, 1)):
        settings = TreeConfig(lookup=8, num_nodes=num_nodes)
        assert choose_tree(settings, tmp_path, num_heads=1) == trees[depth]
    with pytest.raises(UserError, match="has no tree as small"):
        replace(curve, curve=[point for point in curve.curve if len(point.tree) > 1]).up_to(1)


def test_shares_of_nodes_are_of_the_steps_that_looking_up_leaves():
    """The head guesses right where a step would stand without, and is not asked there with it."""
    ranks, found = [np.array([[9], [0], [0], [9]])], [np.array([2, 0, 0, 0])]
    tree = replace(chain(1), num_lookup=4)
    assert node_shares(ranks, tree) == [1.0, 0.5]
    assert node_shares(ranks, tree, found) == [1.0, 0.0]


def test_looked_up_nodes_that_save_few_steps_are_not_timed():
    ranks = [np.full((18, 1), 99)]
    timing = Timing(1, {chain(0): 1.0, chain(1): 1.1}, plain=1.0, prefill=1.0)
    trees = [chain(0), *(Tree.from_paths([[n] for n in range(m)]) for m in (3, 7, 15, 31))]
    timing = replace(timing, by_tree={tree: 1 + 0.02 * len(tree) for tree in trees})
    for found_P, is_timed in ((np.zeros(18), False), (np.arange(17, -1, -1), True)):
        replayed = calibrate._Replayed(ranks, [found_P], None)
        assert bool(replayed.with_lookup(timing)) == is_timed
        assert calibrate._Replayed(ranks, [found_P], 4).with_lookup(timing) == []
        assert calibrate._Replayed(ranks, None, None).with_lookup(timing) == []
