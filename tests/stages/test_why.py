"""What an evaluation says of its own speed-up, from a real run of tiny heads."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import build_model

from medusa_exp.config import Config
from medusa_exp.evaluate.break_even import break_even
from medusa_exp.model import build_heads
from medusa_exp.model.checkpoint import save_heads
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.metric_table import PARTS_OF_LOSS, metric_of
from medusa_exp.stages import evaluate, why
from medusa_exp.stages.session import Session
from medusa_exp.tracking.terminal import headlines
from medusa_exp.tree import Tree, chain
from medusa_exp.tree.calibration import Timing, choose, summarize


@pytest.fixture
def run(config: Config, tokenizer, tmp_path) -> Session:
    """A session of a run whose heads guess right now and then."""
    build_model("llama", seed=4, vocab_size=len(tokenizer), spread=2).save_pretrained(
        config.model.path
    )
    config.evaluate.num_prompts, config.evaluate.warmup_prompts = 3, 1
    config.evaluate.baselines, config.evaluate.batch_sizes = ["chain"], [1, 3]
    config.decode.max_new_tokens = 12
    config.tree.kind, config.device, config.run_dir = "chain", "cpu", str(tmp_path / "run")
    session = Session(config, tmp_path / "run")
    save_heads(build_heads(session.backbone(), num_heads=2), session.out / "heads")
    return session


@pytest.fixture
def fixed_seconds(monkeypatch):
    """Have a step take a second, and one over a tree a tenth more, however busy the machine is."""
    records_of, profile = evaluate.records_of, evaluate.profile

    def recorded(*args):
        records = records_of(*args)
        for record in records:
            step = (1.0 if record["method"] == "plain" else 1.1) / record["batch_size"]
            record["prompt_seconds"], record["seconds"] = step, step * record["steps"]
            record["baseline_seconds"] = record["baseline_new_tokens"] / record["batch_size"]
        return records

    def profiled(*args, **options):
        ways = profile(*args, **options)
        for way, of_heads in zip(ways, (0.1, 0.0), strict=True):
            later = way.steps - way.prompts
            way.of_prompts = Counter(prompt=float(way.prompts))
            way.of_steps = Counter(backbone=1.0 * later, heads=of_heads * later)
        return ways

    monkeypatch.setattr(evaluate, "records_of", recorded)
    monkeypatch.setattr(evaluate, "profile", profiled)


def test_a_gap_of_acceptance_is_the_advice_where_it_costs_most(run, fixed_seconds):
    write_json(run.out / "metrics.json", {"val/accept_length_chain": 2.9})
    metrics = evaluate.run(run.config, run.out, run)
    found = read_json(run.out / "why.json")
    assert metrics["eval/tokens_per_step"] < 2.5
    for one in found["waterfalls"]:
        by_name = {part["name"]: part["share"] for part in one["parts"]}
        assert max(by_name, key=by_name.__getitem__) == "acceptance"
        assert by_name["heads"] > 0 and by_name["width"] == by_name["host"] == 0
    gap = "Acceptance falls from 2.90 tokens a step in validation to "
    assert any(sentence.startswith(gap) for sentence in found["advice"])


def test_an_evaluation_says_where_its_speed_up_is_lost(run):
    write_json(run.out / "metrics.json", {"val/accept_length_chain": 2.9})
    metrics = evaluate.run(run.config, run.out, run)
    found = read_json(run.out / "why.json")
    alone, many = found["waterfalls"]
    for one, prefix in ((alone, "why/"), (many, "why/b3/")):
        lost = sum(part["times"] for part in one["parts"])
        assert one["ideal"] - lost == pytest.approx(one["measured"], rel=0.01)
        assert one["ideal"] == metrics["why/ideal"] == 2.9
        assert one["measured"] == metrics[f"eval/tree/b{one['batch_size']}/speedup"]
        shares = {part["name"]: part["share"] for part in one["parts"]}
        assert shares == {name: metrics[f"{prefix}{name}"] for name in shares}
        assert sum(shares.values()) + metrics[f"{prefix}kept"] == pytest.approx(1, abs=0.01)
    assert [part["name"] for part in many["parts"]] == list(PARTS_OF_LOSS)
    assert metrics["eval/tokens_per_step"] < 2.5
    assert found["advice"] and all(found["advice"])
    assert found["when"] and found["schedule"][0][0] == 1 and len(found["schedule"][0]) == 3
    records = [json.loads(line) for line in (run.out / "records.jsonl").read_text().splitlines()]
    assert all(0 < r["prompt_seconds"] < r["seconds"] for r in records)


def test_one_batch_of_several_is_held_against_what_was_timed_alone(run):
    run.config.evaluate.batch_sizes = [3]
    metrics = evaluate.run(run.config, run.out, run)
    found = read_json(run.out / "why.json")
    [fall] = found["waterfalls"]
    names = {part["name"] for part in fall["parts"]}
    assert names == set(PARTS_OF_LOSS) - {"acceptance"}  # there was no validation
    assert abs(metrics["why/unexplained"]) < 1e-9
    assert sum(part["share"] for part in fall["parts"]) + metrics["why/kept"] == pytest.approx(1)
    assert metrics["why/ideal"] == metrics["eval/tokens_per_step"]
    assert found["schedule"] is None


def test_draws_are_a_reason_for_less_acceptance(run, fixed_seconds):
    write_json(run.out / "metrics.json", {"val/accept_length_chain": 29.0})
    run.config.decode.rule, run.config.evaluate.batch_sizes = "sampling", [1]
    evaluate.run(run.config, run.out, run)
    [sentence] = read_json(run.out / "why.json")["advice"]
    assert "decoding draws its own (decode.rule=sampling, decode.temperature=" in sentence


CURVE = [
    SimpleNamespace(num_nodes=n, tokens_per_step=t) for n, t in ((1, 1.0), (8, 2.0), (16, 2.4))
]
IN_VALIDATION = {"val/accept_length": 3.6, "val/accept_length_chain": 2.5}


@pytest.mark.parametrize(
    ("kind", "tree", "rule", "draft", "metrics", "expected"),
    [
        ("chain", chain(2), "greedy", "top", IN_VALIDATION, 2.5),
        ("chain", chain(2), "greedy", "top", {}, None),
        ("chain", Tree((-1, 0), (-1, 0), num_lookup=3), "greedy", "top", IN_VALIDATION, None),
        ("chain", chain(2), "typical", "top", IN_VALIDATION, None),
        ("medusa_63", chain(2), "greedy", "top", IN_VALIDATION, None),
        ("calibrated", chain(15), "greedy", "top", IN_VALIDATION, 3.6),
        ("calibrated", chain(7), "greedy", "top", IN_VALIDATION, 1 + 2.6 * 1.0 / 1.4),
        ("calibrated", chain(11), "greedy", "top", IN_VALIDATION, 1 + 2.6 * 1.2 / 1.4),
        ("calibrated", chain(0), "greedy", "top", IN_VALIDATION, None),
        ("chain", chain(0), "greedy", "top", IN_VALIDATION, None),
        ("calibrated", chain(7), "sampling", "sampled", IN_VALIDATION, None),
        ("calibrated", chain(7), "greedy", "top", {}, None),
    ],
)
def test_what_validation_says_of_a_tree(
    tmp_path, monkeypatch, kind, tree, rule, draft, metrics, expected
):
    run = Session(Config(), tmp_path)
    run.config.tree.kind, run.config.decode.rule = kind, rule
    write_json(run.out / "metrics.json", metrics)
    calibration = SimpleNamespace(curve=CURVE, draft=draft)
    monkeypatch.setattr(why, "_calibration", lambda session: calibration)
    found = why.expected_tokens_per_step(run, tree)
    assert found == (None if expected is None else pytest.approx(expected))


def test_where_calibration_accepted_no_guess_nothing_is_expected_of_other_sizes():
    useless = [SimpleNamespace(num_nodes=n, tokens_per_step=1.0) for n in (1, 8, 16)]
    assert why._relative(SimpleNamespace(curve=useless), 8, 16) is None


def test_the_table_has_the_whole_number_that_the_sentence_says(run, monkeypatch):
    when = break_even("tree", {1: 2.0, 3: 0.5})
    assert 2 < when.size < 2.1
    monkeypatch.setattr(why, "break_even", lambda *measured: when)
    metrics = evaluate.run(run.config, run.out, run)
    assert read_json(run.out / "why.json")["when"].startswith("From 3 prompts at a time on")
    assert (metric_of("why/break_even_batch_size").title, "3") in headlines(metrics)


def test_engines_do_not_draft_where_plain_decoding_is_likely_to_be_faster(tmp_path):
    """Of two prompts a time one took twice as long as plainly, and the other two thirds."""
    seconds = {1: (5.0, 5.0), 2: (20.0, 20.0, 6.7, 6.7)}
    by_size = {
        size: [
            {
                **{"method": method, "batch_size": size, "accept_lengths": [1, 2, 3]},
                **{"new_tokens": 6, "seconds": took, "steps": 3, "prompt_seconds": 1.0},
                **{"baseline_new_tokens": 6, "baseline_seconds": 10.0},
            }
            for method in ("tree", "chain")
            for took in some
        ]
        for size, some in seconds.items()
    }
    when = why._break_even("tree", by_size)
    assert when.speedups == pytest.approx({1: 2.0, 2: 0.75}, abs=0.01)
    assert when.is_unclear(2) and when.size is None
    run = Session(Config(), tmp_path)
    assert why._schedule(run, 3, by_size, when) == [[1, 1, 3], [2, 2, 0]]


def test_a_tree_without_guesses_is_told_so(run, monkeypatch):
    """It has no gap of acceptance, whatever validation found over trees that have guesses."""
    run.config.tree.kind, run.config.tree.num_nodes = "calibrated", 1
    write_json(run.out / "metrics.json", IN_VALIDATION)
    ranks = [np.array([[0, 9], [9, 9], [9, 9], [9, 9]] * 4)]
    times = {chain(0): 1.1, chain(1): 2.0, chain(2): 1.6}
    curve = choose(ranks, Timing(1, times, plain=1.0, prefill=1.0))
    calibration = summarize([curve], ranks, 9, choices=chain(2), heads_sha256="x")
    monkeypatch.setattr(why, "load_calibration", lambda out: calibration)
    monkeypatch.setattr("medusa_exp.tree.calibration.load_calibration", lambda out: calibration)
    evaluate.run(run.config, run.out, run)
    found = read_json(run.out / "why.json")
    assert [fall["ideal"] for fall in found["waterfalls"]] == [1.0, 1.0]
    assert all(fall["parts"][0]["name"] != "acceptance" for fall in found["waterfalls"])
    [sentence] = found["advice"]
    assert "No guesses are drafted, as the tree has one node" in sentence
    assert "(the first head is right 25% of the time)" in sentence
    seconds, plain = 1 + 11 * 1.6, 1 + 15 * 1.0  # of the answer over three nodes, and plainly
    assert (
        f"of 3 nodes, a step makes {16 / 12:.2f} tokens in the time in which plain decoding "
        f"makes {16 / 12 * seconds / plain:.2f}." in sentence
    )
