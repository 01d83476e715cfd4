"""The table of metrics: what is declared of each, and that each is declared."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from medusa_exp.errors import UserError
from medusa_exp.runs.metric_table import (
    METRICS,
    as_objective,
    fields,
    is_larger_better,
    is_timed,
    metric_of,
)

ROOT = Path(__file__).parents[2]
MEASURED_IN = ("stages", "train", "evaluate")
WORDS = ("pretrain", "data", "doctor", "regenerate", "train", "val", "calibrate", "eval", "chat")


@pytest.mark.parametrize(("rate", "shown"), [(4.86, "4.9"), (99.4, "99.4"), (842.4, "842")])
def test_few_tokens_per_second_are_not_rounded_to_whole_ones(rate, shown):
    """5 beside 6 contradicts a speed-up of 1.30x."""
    assert metric_of("eval/tokens_per_second").text(rate) == shown
    assert metric_of("eval/num_nodes").text(4.0) == "4"


@pytest.mark.parametrize(
    ("metric", "is_larger"),
    [
        ("eval/speedup", True),
        ("eval/is_lossless", True),
        ("eval/tokens_per_second", True),
        ("calibrate/break_even_batch_size", True),
        ("val/loss_head1", False),
        ("train/loss", False),
        ("eval/backbone_nats_per_token", False),
        ("eval/outside_backbone_fraction", False),
        ("eval/time/heads", False),
    ],
)
def test_which_way_a_metric_is_better(metric, is_larger):
    assert is_larger_better(metric) == is_larger


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("eval/tree/b1/tokens_per_second", True),
        ("eval/time/heads", True),
        ("calibrate/num_nodes", True),
        ("eval/num_nodes", True),
        ("eval/tokens_per_step", False),
        ("train/loss", False),
    ],
)
def test_which_metrics_the_clock_gives(metric, expected):
    assert is_timed(metric) == expected


@pytest.mark.parametrize(
    ("metric", "stage"),
    [
        ("eval/speedup", "evaluate"),
        ("val/loss_head1", "train"),
        ("calibrate/num_nodes", "calibrate"),
        ("doctor/top1", "inspect"),
    ],
)
def test_which_stage_measures_a_metric(metric, stage):
    assert as_objective(metric).stage == stage


def test_words_in_a_name_do_not_turn_it_around():
    assert not is_larger_better("eval/num_differences")
    assert is_larger_better("eval/category/memory/tokens_per_step")
    assert not is_timed("eval/category/memory/tokens_per_step")


def test_an_objective_without_a_row_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"objective=train/los is no metric.*train/loss"):
        as_objective("train/los")
    with pytest.raises(UserError, match=r"objective=x is no metric.*metrics\.md has all"):
        as_objective("x")


def test_what_stands_in_a_name_is_read_by_its_pattern():
    assert fields("eval/tree/b{batch_size}/speedup", "eval/tree/b4/speedup") == {"batch_size": "4"}
    assert fields("eval/tree/b{batch_size}/speedup", "eval/chain/b4/speedup") is None
    assert metric_of("eval/category/b1/speedup").name == "eval/category/{category}/speedup"
    assert metric_of("val/top1_head12").name == "val/top1_head{head}"


def test_no_two_rows_have_one_name():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))


def test_every_metric_of_the_golden_runs_has_a_row():
    runs = json.loads((ROOT / "tests/golden/runs.json").read_text())["runs"]
    old = json.loads((ROOT / "tests/golden/run_of_9ce118e/done/metrics.json").read_text())
    names = {name for run in runs.values() for name in run["metrics"]} | set(old)
    assert len(names) > 50 and [name for name in names if metric_of(name) is None] == []


def test_every_metric_that_is_named_where_metrics_are_measured_has_a_row():
    named, parts = set(), "|".join(WORDS)
    for folder in MEASURED_IN:
        for path in (ROOT / "src/medusa_exp" / folder).glob("*.py"):
            found = [
                n.value for n in ast.walk(ast.parse(path.read_text())) if type(n) is ast.Constant
            ]
            named |= {x for x in found if re.fullmatch(rf"({parts})/[a-z0-9_]+", str(x))}
    # The constant part of f"val/top1_head{k}" wants its number.
    missing = [name for name in named if not (metric_of(name) or metric_of(f"{name}1"))]
    assert len(named) > 25 and missing == []


def test_the_reference_is_up_to_date():
    written = runpy.run_path(str(ROOT / "scripts/metric_reference.py"))["reference"]()
    assert (ROOT / "docs/reference/metrics.md").read_text() == written, "run the script again"
