"""The page of a sweep: every job on it, the best named, nothing loaded."""

import pytest
from report_pages import Page, write, write_sweep

from medusa_exp.config.command_line import split_override
from medusa_exp.tracking.sweep_report import content, write_comparison


def test_every_job_and_every_failure_is_shown(tmp_path):
    path = write_comparison(write_sweep(tmp_path))
    page = Page(path.read_text(encoding="utf-8"))
    assert "2 done, 1 failed, 1 interrupted" in page.text
    assert "</script><b>head.num_heads=99 is out of range" in page.text
    assert "2 of 4 jobs did not finish" in page.text
    assert [a for a in page.addresses if not a.startswith("#")] == [
        "b/report.html",
        "a/report.html",
        "b/report.html",
    ], "the best in the headline, then the jobs that have a report"
    assert path.stat().st_size < 3_000_000
    assert len(page.specs) == 4, "costs, parallel coordinates, and a chart of each key"
    assert "3.05 to 3.45" in page.text, "the best job's interval"
    assert f"'stages=[evaluate,report]' run_dir={tmp_path}/b" in page.text


def test_what_was_only_trained_is_calibrated_before_it_is_evaluated(tmp_path):
    write_sweep(tmp_path, "val/accept_length")
    for name in "ab":
        write(tmp_path / name / "metrics.json", {"val/accept_length": 3.0})
    assert "stages=[calibrate,evaluate,report]" in content(tmp_path)["again"]


@pytest.mark.parametrize(
    ("objective", "best", "aggregate"), [("eval/speedup", 1, "max"), ("val/loss_head1", 0, "min")]
)
def test_the_best_is_the_greatest_or_of_a_loss_the_least(tmp_path, objective, best, aggregate):
    shown = content(write_sweep(tmp_path, objective))
    assert shown["best"]["number"] == best
    assert shown["keys"] == ["head.num_heads", "dtype"]
    assert shown["shared"] == ["+experiment=x"]
    [shades] = [
        {row["job"]: row["shade"] for row in layer["data"]["values"]}
        for layer in shown["coordinates"]["layer"]
        if layer["mark"]["type"] == "line"
    ]
    assert shades[best] == 1 and sorted(shades.values()) == [0, 1]
    for effect in shown["effects"].values():
        [line] = [layer for layer in effect["layer"] if layer["mark"]["type"] == "line"]
        assert line["encoding"]["y"]["aggregate"] == aggregate


def test_jobs_of_another_objective_are_ranked_by_the_one_of_most(tmp_path):
    job = {"number": 0, "status": "done", "overrides": ["objective=val/loss_head1"]}
    write(tmp_path / "e" / "job.json", {**job, "objective": "val/loss_head1", "value": 90.0})
    write(tmp_path / "e" / "metrics.json", {"val/loss_head1": 90.0, "eval/speedup": 3.5})
    shown = content(write_sweep(tmp_path))
    assert shown["objective"] == "eval/speedup", "two jobs have a value of it"
    assert shown["best"]["job"] == "e" and shown["best"]["value"] == 3.5
    (tmp_path / "e" / "metrics.json").unlink()
    assert content(tmp_path)["best"]["job"] == "b", "90 is no speed-up"


def test_a_damaged_file_of_one_job_costs_the_page_nothing_else(tmp_path, caplog):
    (write_sweep(tmp_path) / "a" / "metrics.json").write_text("{")
    assert content(tmp_path)["best"]["job"] == "b"
    assert "a/metrics.json is not valid JSON" in caplog.text


def test_numbers_stand_in_order_on_their_axis(tmp_path):
    lines, *_ = [
        layer["data"]["values"]
        for layer in content(write_sweep(tmp_path))["coordinates"]["layer"]
        if layer["mark"]["type"] == "line"
    ]
    places = {row["job"]: row["position"] for row in lines if row["axis"] == "head.num_heads"}
    assert places == {0: 0.0, 1: 1.0}, "3 below 10, though not as text"


def test_a_sweep_of_one_job_has_no_charts(tmp_path):
    write_sweep(tmp_path)
    for name in "bcd":
        (tmp_path / name / "job.json").unlink()
    page = Page(write_comparison(tmp_path).read_text(encoding="utf-8"))
    assert page.specs == []
    assert "1 done" in page.text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("+experiment=medusa1", ("experiment", "medusa1")),
        ("head.num_heads=3", ("head.num_heads", "3")),
        ("tree.paths=[[0],[0,0]]", ("tree.paths", "[[0], [0, 0]]")),
        ("dtype=fp32", ("dtype", "fp32")),
    ],
)
def test_an_override_is_a_key_and_a_value(override, parts):
    assert split_override(override) == parts


def test_a_point_says_what_a_step_makes_and_costs(tmp_path):
    write_sweep(tmp_path)
    write(tmp_path / "b" / "metrics.json", {"eval/tokens_per_step": 4.0})
    assert content(tmp_path)["costs"] is None, "one job alone has both figures"
    of_both = {"eval/speedup": 2.0, "eval/speedup_low": 1.9, "eval/speedup_high": 2.1}
    for name, tokens in (("a", 3.0), ("b", 4.0)):
        write(tmp_path / name / "metrics.json", {**of_both, "eval/tokens_per_step": tokens})
    shown = content(tmp_path)["costs"]["data"]["values"]
    assert {(row["tokens"], row["cost"]) for row in shown} == {(3.0, 1.5), (4.0, 2.0)}
    assert 'id="costs"' in write_comparison(tmp_path).read_text(encoding="utf-8")
