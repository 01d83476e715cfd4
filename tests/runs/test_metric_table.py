"""What the names of metrics are taken to mean."""

import pytest

from medusa_exp.runs.metric_table import is_larger_better, is_timed, stage_of


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


def test_a_name_tells_the_stage():
    assert stage_of("eval/speedup") == "evaluate" and stage_of("val/loss_head1") == "train"
    assert stage_of("calibrate/num_nodes") == "calibrate"


@pytest.mark.xfail(reason="read off words in the name", strict=True)
def test_words_in_a_name_do_not_turn_it_around():
    assert not is_larger_better("eval/num_differences")
    assert is_larger_better("eval/category/memory/tokens_per_step")
    assert not is_timed("eval/category/memory/tokens_per_step")
