"""The report of a run: complete, self-contained, honest, and never stopped by a missing file."""

import json
import re
import subprocess
import sys

import pytest
from report_pages import (
    CALIBRATION,
    FILES,
    METRICS,
    RECORDS,
    RUN,
    SAMPLES,
    TREE,
    WHY,
    Page,
    page_of,
    write_run,
)

from medusa_exp.errors import UserError
from medusa_exp.tracking.charts import tree_layout
from medusa_exp.tracking.run_report import write_report


def test_full_run_shows_its_figures(tmp_path):
    page = page_of(write_run(tmp_path))
    figures = "1.62\u00d7 2.14 842 1.19\u00d7 1.31\u00d7 71.3 2.55 61.2"
    assert [figure for figure in figures.split() if figure not in page.text] == []
    assert "identical to plain decoding on 5 of 5 prompts" in page.text
    assert "python -m medusa_exp +experiment=quickstart" in page.text
    assert "8f3c1d0, with uncommitted changes" in page.text
    assert "ValueError: no" in page.text
    assert "yet:" not in page.text
    assert len(page.specs) == 11  # one each, but three of the calibration and two curves


def test_page_is_one_small_file_that_loads_nothing(tmp_path):
    write_run(tmp_path)
    path = write_report(tmp_path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 3_000_000
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, "report.html"}
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert "default-src 'none'" in html
    assert "http" not in json.dumps(page.specs)
    assert not re.search(r"@import|url\(\s*['\"]?http|\bimport\s*\(?['\"]http", html)
    assert not {"link", "img", "iframe"} & set(page.tags)


def test_text_of_files_cannot_become_markup(tmp_path):
    samples = [{**SAMPLES[0], "category": "</script><b>"}]
    metrics = {**METRICS, "eval/category/</script><b>/speedup": 1.1}
    html = write_report(
        write_run(tmp_path, samples__jsonl=samples, metrics__json=metrics)
    ).read_text(encoding="utf-8")
    assert "</script><b>" not in html
    assert "b" not in Page(html).tags
    assert "</script><b>bold" in Page(html).text


def test_samples_show_steps_and_special_tokens(tmp_path):
    page = page_of(write_run(tmp_path))
    assert page.titles == ["step 1: 2 tokens", "step 2: 1 token", "step 3: 3 tokens"]
    assert "She bought3 <i> of<|im_end|>" in page.text


@pytest.mark.parametrize("name", FILES)
def test_missing_file_costs_its_section_only(tmp_path, name):
    (write_run(tmp_path) / name).unlink()
    page = page_of(tmp_path)
    assert "yet:" in page.text
    assert "Provenance" in page.text


def test_empty_directory_names_the_stages(tmp_path):
    page = page_of(tmp_path)
    assert page.specs == []
    for stage in ("train", "calibrate", "evaluate"):
        assert f"stages=[{stage}]" in page.text


def test_different_output_is_said_in_the_headline(tmp_path):
    metrics = {**METRICS, "eval/identical_fraction": 0.9}
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    assert "Output differs from plain decoding: it is identical on only 90.0" in page.text
    assert "\u2713 Output identical" not in page.text


def test_one_different_record_is_enough(tmp_path):
    records = [{**RECORDS[0], "identical": i > 0} for i in range(5)]
    page = page_of(write_run(tmp_path, records__jsonl=records))
    assert "identical on only 4 of 5 prompts" in page.text


def test_unchecked_output_is_not_called_identical(tmp_path):
    metrics = {k: v for k, v in METRICS.items() if k != "eval/identical_fraction"}
    page = page_of(write_run(tmp_path, metrics__json=metrics, records__jsonl=[]))
    assert "was not compared with plain decoding" in page.text


def test_slow_results_are_said_plainly(tmp_path):
    metrics = {**METRICS, "eval/speedup": 0.8, "eval/baseline_vs_hf": 0.5}
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    assert "Slower than plain decoding" in page.text
    assert "against that the speed-up is 0.40" in page.text


def test_what_may_be_chance_is_called_neither_faster_nor_slower(tmp_path):
    metrics = {**METRICS, "eval/speedup": 0.996, "eval/speedup_low": 0.9, "eval/speedup_high": 1.1}
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    assert "Neither clearly faster nor slower than plain decoding" in page.text


def test_last_line_of_a_step_counts_and_nan_is_counted(tmp_path):
    page = page_of(write_run(tmp_path))
    drawn = json.dumps(page.specs)
    assert "3.25" in drawn
    assert "9.125" not in drawn
    assert "1 value was not finite" in page.text


def test_torn_last_line_is_passed_over_and_a_broken_one_is_named(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text() + '{"stage": "tr')
    write_report(tmp_path)
    path.write_text('{"stage"\n' + path.read_text())
    with pytest.raises(UserError, match=r"history\.jsonl, line 1,"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_other_tree_than_the_calibrated_one_is_drawn_without_probability(tmp_path):
    page = page_of(write_run(tmp_path, tree__json={"parents": [-1, 0], "ranks": [-1, 0]}))
    assert "2 nodes, 1 deep" in page.text
    assert "The stronger the colour" not in page.text


def test_what_a_tree_predicts_is_what_its_calibration_says(tmp_path):
    """Probabilities are of steps after the prompts', 2.2 together; of the tree that was chosen."""
    shape = {**TREE, "num_picked": None, "num_lookup": 0}
    measured = {**CALIBRATION, "tree": shape, "predicted_tokens_per_step": 1.95}
    page = page_of(write_run(tmp_path, calibration__json=measured))
    assert "commits the node; calibration predicted 1.95 tokens per step" in page.text
    assert "2.20" not in page.text
    for other in ({**TREE, "ranks": [-1, 0, 2, 0]}, {**TREE, "num_lookup": 2}):
        page = page_of(write_run(tmp_path, calibration__json=measured, tree__json=other))
        assert "The stronger the colour" not in page.text and "1.95" not in page.text


def _point(nodes: int, num_lookup: int, speed: float, is_rehearsed: bool) -> dict:
    shape = {"parents": list(range(-1, nodes - 1)), "ranks": [-1, *[0] * (nodes - 1)]}
    return {
        "num_nodes": nodes + num_lookup,
        "tokens_per_step": 1.5,
        "step_seconds": 0.002,
        "tokens_per_second": speed,
        "tree": {**shape, "num_picked": None, "num_lookup": num_lookup},
        "is_rehearsed": is_rehearsed,
    }


def test_trees_that_were_tried_on_whole_answers_are_told_from_estimates(tmp_path):
    curve = [_point(1, 0, 411, True), _point(2, 0, 433, False), _point(3, 0, 422, True)]
    looked_up = [_point(2, 2, 455, True), _point(1, 2, 444, False)]
    for chosen, said in (
        (curve[2], "3 nodes for the most tokens"),
        (looked_up[0], "2 nodes and 2 looked up for the most tokens"),
        (curve[0], "1 node, as no guesses pay"),
    ):
        measured = {
            **CALIBRATION,
            **{"curve": curve, "with_lookup": looked_up},
            **{"tree": chosen["tree"], "num_nodes": chosen["num_nodes"]},
        }
        page = page_of(write_run(tmp_path, calibration__json=measured))
        assert f"calibration chose {said}" in page.text
        assert "and the fastest of these was chosen. Tokens per second of the others" in page.text
        _, _, table = page.text.partition("tokens per secondfound by")
        rows = ("1", 411, "tried"), ("2", 433, "estimated"), ("3", 422, "tried")
        rows += ("2 + 2 looked up", 455, "tried"), ("1 + 2 looked up", 444, "estimated")
        for row, (nodes, speed, found_by) in zip([*curve, *looked_up], rows, strict=True):
            mark = " (chosen)" if row is chosen else ""
            assert f"{nodes}{mark} 1.501.11\u00d7{speed}{found_by}" in table
        assert table.count("(chosen)") == 1
        drawn = [spec for spec in page.specs if "(pale: estimated)" in json.dumps(spec)]
        assert len(drawn) == 1 and "datum.is_estimate" in json.dumps(drawn)
    curve[0]["is_rehearsed"] = False  # chosen where looking up does not pay
    page = page_of(write_run(tmp_path, calibration__json=measured))
    assert "tried on whole answers: none was faster than plain decoding." in page.text


def test_where_no_tree_was_tried_nothing_is_told_apart(tmp_path):
    page = page_of(write_run(tmp_path))
    assert "estimated" not in page.text and "4 (chosen) 2.00" in page.text


def test_tree_layout_puts_parents_between_their_children():
    nodes = tree_layout([-1, 0, 0, 1, 1], [-1, 0, 1, 1, 0], None)
    assert [node["row"] for node in nodes] == [1.25, 0.5, 2.0, 1.0, 0.0]
    assert [node["path"] for node in nodes] == ["root", "0", "1", "0 > 1", "0 > 0"]


def test_a_command_loads_what_draws_only_where_it_draws():
    code = (
        "import sys, medusa_exp.cli, medusa_exp.tracking.terminal, medusa_exp.tracking.tracker\n"
        "assert not {'altair', 'jinja2', 'vl_convert', 'wandb', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_batches_and_depths_have_tables(tmp_path):
    metrics = {
        **METRICS,
        "eval/tree/b4/speedup": 1.43,
        "eval/tree/b4/tokens_per_step": 2.11,
        "eval/tree/b4/identical_fraction": 0.5,
        "eval/accepted_depth1": 0.617,
        "eval/outside_backbone_fraction": 0.123,
    }
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    for figure in ("1.43\u00d7", "2.11", "50.0", "61.7", "12.3"):
        assert figure in page.text
    assert "Up to 8 some tree does." in page.text


def test_parts_of_a_step_stand_in_the_order_of_their_time(tmp_path):
    _, _, text = page_of(write_run(tmp_path)).text.partition("Each part is timed by")
    assert 0 < text.index("backbone, on trees") < text.index("heads and drafting")
    assert "83.1" in text
    assert "16.9" in text


def test_what_is_lost_goes_down_from_the_ideal_to_the_speed_up(tmp_path):
    page = page_of(write_run(tmp_path))
    assert "heads and drafting -0.57\u00d7-22.8 %-0.50\u00d7-20.0 %" in page.text
    assert "several prompts at a time -0.84\u00d7-33.6 %" in page.text
    assert "head=medusa_tied" in page.text and "<b>less" in page.text
    assert "From 7 prompts at a time on" in page.text and "[[1, 6, 4], [7, 8, 0]]" in page.text
    [drawn] = [spec for spec in page.specs if '"kind": "lost"' in json.dumps(spec)]
    [bars] = [rows for rows in _values(drawn) if "start" in rows[0]]
    assert [bar["kind"] for bar in bars] == ["speed-up", "lost", "lost", "gained", "speed-up"]
    assert bars[-2]["end"] == pytest.approx(bars[-1]["end"])  # of the smallest batch
    assert [bar["start"] for bar in bars[1:-1]] == [bar["end"] for bar in bars[:-2]]


def test_where_no_step_was_taken_only_the_batch_size_is_said(tmp_path):
    why = {**WHY, "waterfalls": [], "advice": [], "schedule": None}
    text = page_of(write_run(tmp_path, why__json=why)).text
    assert "From 7 prompts at a time on" in text and "heads and drafting -" not in text


def _values(spec: dict) -> list[list[dict]]:
    """Return the rows of data that stand anywhere in a chart."""
    inner = [value for value in spec.values() if isinstance(value, dict)]
    inner += [item for value in spec.values() if isinstance(value, list) for item in value]
    found = [spec["values"]] if isinstance(spec.get("values"), list) else []
    return found + [rows for one in inner if isinstance(one, dict) for rows in _values(one)]


def test_near_ties_are_not_called_other_texts(tmp_path):
    metrics = {**METRICS, "eval/identical_fraction": 0.8, "eval/near_tie_fraction": 1.0}
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    assert "the two tokens nearly tie" in page.text
    assert "compares different texts" not in page.text


def test_lossy_is_called_lossy(tmp_path):
    page = page_of(write_run(tmp_path, metrics__json={**METRICS, "eval/is_lossless": 0.0}))
    assert "LOSSY" in page.text
    assert "LOSSY" not in page_of(write_run(tmp_path)).text


def test_a_stage_of_a_later_call_shows_its_own_command(tmp_path):
    first, later = RUN["command"], ["python", "-m", "medusa_exp", "tree=chain"]
    stages = {
        "train": {"status": "done", "seconds": 1.0, "command": first},
        "evaluate": {"status": "done", "seconds": 1.0, "command": later},
    }
    text = page_of(write_run(tmp_path, run__json={**RUN, "stages": stages})).text
    assert "Made by a later call: evaluate" in text
    assert "python -m medusa_exp tree=chain" in text
    assert "later call" not in page_of(write_run(tmp_path)).text
