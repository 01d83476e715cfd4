"""Where a speed-up is lost: parts that add up, and the planted cause as the largest of them."""

import math
from dataclasses import replace

import pytest

from medusa_exp.evaluate.advice import Facts, Tried, advice
from medusa_exp.evaluate.break_even import break_even
from medusa_exp.evaluate.waterfall import Way, metrics_of, waterfalls
from medusa_exp.runs.metric_table import PARTS_OF_LOSS, metric_of

PLAIN = {"backbone": 8.0, "verification": 0.3, "cache": 0.2, "mask": 0.1, "rest": 1.4}
TREE = {**PLAIN, "heads": 0.4, "backbone": 8.8, "verification": 0.5, "cache": 0.3, "mask": 0.2}
FACTS = Facts(
    num_heads=4,
    num_layers=1,
    has_projections=True,
    vocab_size=32_000,
    tree_kind="calibrated",
    num_nodes=64,
    device_type="cpu",
    is_captured=False,
    uses_kernels=False,
    is_regenerated=False,
    tokens_per_step=3.0,
    max_new_tokens=128,
    when=break_even("tree", {1: 2.0, 16: 0.5}),
)
CAUSES = [
    ("heads", {"heads": 12.0}, {}, "take head=medusa_tied, whose heads share the backbone's"),
    ("heads", {"heads": 12.0}, {"vocab_size": 128_000}, "or head=medusa_lowrank with head.num_tok"),
    ("heads", {"heads": 12.0}, {"num_layers": 8}, "take head.num_layers=1"),
    ("heads", {"heads": 12.0}, {"has_projections": False}, "fewer of them"),
    ("heads", {"heads": 12.0}, {"has_projections": False, "num_heads": 1}, "fewer tokens for it"),
    (
        "width",
        {"backbone": 40.0},
        {"tree_kind": "medusa_63", "run_dir": "my run"},
        "`python -m medusa_exp 'stages=[evaluate]' 'run_dir=my run' tree=calibrated` takes as many "
        "as pay here (this run used a fixed tree, tree=medusa_63)",
    ),
    (
        "width",
        {"backbone": 40.0},
        {"tree_kind": "chain", "is_calibrated": False},
        "'stages=[calibrate,evaluate]' run_dir=RUN_DIR tree=calibrated` takes",
    ),
    (
        "width",
        {"backbone": 40.0},
        {"tree_kind": "custom", "is_calibrated": False, "can_calibrate": False},
        "fewer may be faster here (this run used a fixed tree, tree=custom)",
    ),
    (
        "width",
        {"backbone": 40.0},
        {"tree_kind": "dynamic"},
        "(this run used a tree of its own at each step, tree=dynamic)",
    ),
    ("width", {"mask": 30.0}, {}, "a processor has little arithmetic"),
    ("width", {"backbone": 40.0}, {"device_type": "cuda"}, "train.text=regenerated"),
    ("verification", {"verification": 20.0}, {"device_type": "cuda"}, "decode.verifier=cupy"),
    ("verification", {"cache": 20.0}, {}, "take a smaller tree (now 64 nodes; tree.num_nodes=32"),
    (
        "verification",
        {"cache": 20.0},
        {"tree_kind": "custom", "is_calibrated": False, "can_calibrate": False},
        "take a smaller tree (now 64 nodes).",
    ),
    ("verification", {"cache": 20.0}, {"device_type": "cuda", "uses_kernels": True}, ": take a sm"),
    ("width", {"backbone": 40.0}, {"device_type": "cuda", "is_regenerated": True}, "train longer."),
    ("host", {"rest": 30.0}, {"device_type": "cuda"}, "decode.cuda_graph=true"),
    ("host", {"rest": 30.0}, {}, "decode.compile=true"),
]


def ways(tree_parts=TREE, prompt=40.0, slower=0.0, tokens=3000, steps=1000) -> tuple[Way, Way]:
    """Return 100 responses over a tree and plainly: a step takes what its parts and `slower` do."""
    later, prompts = steps - 100, 100
    of_tree = sum(tree_parts.values()) + slower
    tree = Way(
        tokens, steps, prompts, prompts * prompt + later * of_tree, prompts * prompt, tree_parts
    )
    seconds = prompts * prompt + (tokens - prompts) * sum(PLAIN.values())
    return tree, Way(tokens, tokens, prompts, seconds, prompts * prompt, PLAIN)


def speedup_of(tree: Way, plain: Way) -> float:
    return (tree.tokens / tree.seconds) / (plain.tokens / plain.seconds)


def falls(tree: Way, plain: Way, more: dict[int, float] | None = None, **options):
    speedups = {1: speedup_of(tree, plain), **(more or {})}
    return waterfalls(
        tree, plain, tokens_per_step=tree.tokens / tree.steps, speedups=speedups, **options
    )


def shares(found) -> dict[str, float]:
    return {part.name: part.share for part in found.parts}


@pytest.mark.parametrize("expected", [None, 3.0, 3.4, 2.5])
@pytest.mark.parametrize("slower", [0.0, 5.0, -9.0])
@pytest.mark.parametrize("prompt", [0.0, 10.0, 900.0])
def test_parts_add_up_to_the_whole(expected, slower, prompt):
    tree, plain = ways(prompt=prompt, slower=slower)
    for found in falls(tree, plain, {4: 1.7, 16: 0.6, 64: 3.0}, expected=expected):
        assert found.ideal == (expected or 3.0)
        lost = sum(part.times for part in found.parts)
        assert found.ideal - lost == pytest.approx(found.measured, rel=1e-9)
        total = found.measured / found.ideal + sum(part.share for part in found.parts)
        assert total == pytest.approx(1, abs=1e-9)
        assert all(math.isfinite(part.times) for part in found.parts)
        assert {part.name for part in found.parts} <= set(PARTS_OF_LOSS)


@pytest.mark.parametrize(("cause", "parts", "facts", "said"), CAUSES)
def test_a_planted_cost_is_the_largest_part(cause, parts, facts, said):
    tree, plain = ways({**TREE, **parts})
    [found] = falls(tree, plain)
    assert found.largest.name == cause
    assert found.largest.share > 0.25
    sentence = advice(found, tree, plain, replace(FACTS, **facts))
    assert said in sentence
    assert f"{found.largest.share:.0%} of the ideal" in sentence


def test_a_share_of_a_step_is_said_of_the_heads():
    tree, plain = ways({**TREE, "heads": 5.0})
    [found] = falls(tree, plain)
    share = 5.0 / sum({**TREE, "heads": 5.0}.values())
    assert f"The heads take {share:.0%} of a step" in advice(found, tree, plain, FACTS)


def test_what_no_part_took_is_called_not_explained():
    tree, plain = ways(slower=20.0)
    [found] = falls(tree, plain)
    assert found.largest.name == "unexplained"
    assert "evaluate.repeats=3" in advice(found, tree, plain, FACTS)
    host = shares(found)["host"]
    assert host == pytest.approx(shares(falls(*ways())[0])["host"], abs=1e-9) == 0


def test_long_prompts_are_not_sped_up():
    tree, plain = ways(prompt=400.0)
    [found] = falls(tree, plain)
    assert found.largest.name == "prompt"
    assert "decode.max_new_tokens, now 128" in advice(found, tree, plain, FACTS)
    as_a_step = sum(PLAIN.values())
    assert shares(falls(*ways(prompt=as_a_step))[0])["prompt"] == pytest.approx(0, abs=1e-9)


def test_a_gap_of_acceptance_names_its_reasons():
    tree, plain = ways()
    [found] = falls(tree, plain, expected=6.2)
    assert found.largest.name == "acceptance"
    facts = replace(FACTS, reasons=["the chat template {differs}", "{%"])
    said = advice(found, tree, plain, facts)
    assert "falls from 6.20 tokens a step in validation to 3.00 in decoding" in said
    assert said.endswith("the chat template {differs}; {%.")
    assert "nothing was found" in advice(found, tree, plain, FACTS)


def test_decoding_may_accept_more_than_validation():
    [found] = falls(*ways(), expected=2.5)
    assert shares(found)["acceptance"] < 0


def test_a_large_batch_is_a_part_of_its_own():
    tree, plain = ways()
    alone, many = falls(tree, plain, {16: 0.5})
    assert "batch" not in shares(alone)
    assert many.largest.name == "batch"
    said = advice(many, tree, plain, FACTS)
    assert "16 prompts at a time keep the device busy" in said
    assert "speculate up to 6 prompts at a time, and calibrate" in said
    faster = replace(FACTS, when=break_even("tree", {1: 2.0, 16: 1.1}))
    assert "drafts pay there still" in advice(many, tree, plain, faster)
    unclear = break_even("tree", {1: 2.0, 16: 0.9}, {16: (0.7, 1.1)})
    said = advice(many, tree, plain, replace(FACTS, when=unclear))
    assert "whether drafts pay there is not clear" in said
    slower = replace(FACTS, when=break_even("tree", {1: 0.9, 16: 0.5}))
    assert "decode plainly" in advice(many, tree, plain, slower)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"tried": Tried(3, 1.2, 0.8, 0.25)}, "(the first head is right 25% of the time), or a st"),
        (
            {"tried": Tried(3, 1.2, 0.8)},
            "1.20 tokens in the time in which plain decoding makes 1.50",
        ),
        ({"tried": Tried(3, 1.2, 0.8)}, "Train longer, or on the model's own answers"),
        ({"tried": Tried(3, 1.2, 0.8), "is_regenerated": True}, " makes 1.50. Train longer."),
        ({"tried": Tried(3, 1.2, 0.8), "is_tree_set": True}, "The heads guess too badly, or"),
        (
            {"tried": Tried(3, 1.8, 1.3), "is_tree_set": True},
            "a tree of 3 nodes to be 1.30 times as fast: tree=calibrated tree.num_nodes=null takes",
        ),
        (
            {"tree_kind": "custom", "is_calibrated": False},
            "run_dir=RUN_DIR tree=calibrated` takes as many nodes as pay here.",
        ),
        (
            {"tree_kind": "custom", "is_calibrated": False, "can_calibrate": False},
            "A tree of more nodes may be faster.",
        ),
    ],
)
def test_a_tree_of_one_node_has_no_guesses_whatever_takes_most(facts, said):
    for parts in (TREE, {**TREE, "backbone": 40.0}, PLAIN):
        tree, plain = ways(parts, prompt=sum(PLAIN.values()), tokens=1000, steps=1000)
        [found] = falls(tree, plain)
        sentence = advice(found, tree, plain, replace(FACTS, num_nodes=1, **facts))
        assert sentence.startswith("No guesses are drafted, as the tree has one node")
        assert said in sentence


def test_without_a_step_there_is_nothing_to_explain():
    assert falls(*ways(tokens=100, steps=100)) == []


def test_ideal_decoding_has_nothing_to_mend():
    tree, plain = ways(PLAIN, prompt=sum(PLAIN.values()))
    [found] = falls(tree, plain)
    assert found.measured == pytest.approx(found.ideal)
    assert "Next to nothing is lost" in advice(found, tree, plain, FACTS)


def test_every_part_is_a_declared_metric():
    found = falls(*ways(), {8: 1.1}, expected=3.5)
    metrics = metrics_of(found)
    assert {"why/ideal", "why/kept", "why/heads", "why/b8/batch", "why/b1/acceptance"} <= set(
        metrics
    )
    assert "why/batch" not in metrics
    for name in metrics:
        row = metric_of(name)
        assert row is not None and row.is_timed and row.stage == "evaluate"
    of_smallest = [metrics[f"why/{name}"] for name in ("kept", *PARTS_OF_LOSS) if name != "batch"]
    assert sum(of_smallest) == pytest.approx(1)
