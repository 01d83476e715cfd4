"""What W&B has of a run's numbers, tables and pictures, read back by its own reader."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import wandb_files as written
from wandb_files import of_type

from medusa_exp.runs.metric_table import AXES

BEST = (
    "val/accept_length",
    "val/accept_length_chain",
    "val/top1_head*",
    "val/top5_head*",
    "val/loss_head*",
)


def read(path: Path):
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_is_in_the_summary(run_dir, summary):
    metrics = read(run_dir / "metrics.json")
    assert {name: summary.get(name) for name in metrics} == metrics
    assert len(metrics) > 60


def test_the_history_is_drawn_against_its_steps(run_dir, records):
    logged = [row["item"] for row in of_type(records, "history")]
    for row in read_lines(run_dir / "history.jsonl"):
        expected = {f"{row.pop('stage')}/step": row.pop("step"), **row}
        assert any(expected.items() <= item.items() for item in logged), expected
    defined = {m.get("glob_name") or m["name"]: m for m in of_type(records, "metric")}
    assert defined["train/*"]["step_metric"] == "train/step"
    for pattern in BEST:
        better = "min" if pattern == "val/loss_head*" else "max"
        assert defined[pattern]["summary"] == {better: True}
        assert defined[pattern]["step_metric"] == "train/step"
    for word, axis in AXES.items():
        if word != "val":
            assert defined[f"{word}/*"]["step_metric"] == axis
        assert any(axis in item for item in logged), axis


def test_the_best_values_are_kept(run_dir, summary):
    rows = [row for row in read_lines(run_dir / "history.jsonl") if "val/loss_head1" in row]
    assert len(rows) == 2
    assert summary["best/val/loss_head1"] == min(row["val/loss_head1"] for row in rows)
    assert summary["best/val/accept_length"] == max(row["val/accept_length"] for row in rows)


def test_curves_over_heads_depths_and_trees(run_dir, records):
    metrics, measured = read(run_dir / "metrics.json"), read(run_dir / "calibration.json")
    logged = [row["item"] for row in of_type(records, "history")]

    def curve(axis: str, name: str) -> dict:
        return {row[axis]: row[name] for row in logged if name in row}

    assert curve("by_head/head", "by_head/top1") == {
        k: metrics[f"val/top1_head{k}"] for k in (1, 2)
    }
    sizes = curve("by_nodes/num_nodes", "by_nodes/tokens_per_step")
    assert sizes == {row["num_nodes"]: row["tokens_per_step"] for row in measured["curve"]}
    if not measured["tree"]["num_lookup"]:  # the curve is of the heads' own trees
        found = curve("by_nodes/num_nodes", "by_nodes/speedup")[measured["num_nodes"]]
        assert found == pytest.approx(metrics["calibrate/predicted_speedup"])
    assert curve("by_batch/batch_size", "by_batch/speedup") == {1: metrics["eval/speedup"]}
    accepted = {k: v for k, v in metrics.items() if k.startswith("eval/accepted_depth")}
    assert list(curve("by_depth/depth", "by_depth/accepted").values()) == list(accepted.values())


def test_the_table_of_records_is_records_jsonl(run_dir, file):
    rows = written.table(file, "eval/records")
    expected = read_lines(run_dir / "records.jsonl")
    assert len(rows) == len(expected) > 0
    for row, record in zip(rows, expected, strict=True):
        if row["accept_lengths"] is not None:
            row["accept_lengths"] = json.loads(row["accept_lengths"])
        assert {name: row[name] for name in record} == record


def test_the_table_of_samples_shows_accepted_runs(run_dir, file):
    for row, sample in zip(
        written.table(file, "eval/samples"), read_lines(run_dir / "samples.jsonl"), strict=True
    ):
        runs = ["".join(step) for step in sample["steps"]]
        assert row["prompt"] == sample["prompt"] and row["answer"] == "".join(runs)
        assert row["accepted_runs"].split(" | ") == runs
        assert json.loads(row["accept_lengths"]) == [len(step) for step in sample["steps"]]


def test_the_table_of_data_says_what_was_kept(run_dir, file):
    (row,) = written.table(file, "data/dropped")
    found = read(run_dir / "data.json")["sources"]["synthetic"]
    assert row["outcome"] == "kept" and row["records"] == found["kept records"] == 120


def test_the_histogram_counts_every_step(run_dir, summary):
    ours = [r for r in read_lines(run_dir / "records.jsonl") if r["method"] == "tree"]
    lengths = [length for record in ours for length in record["accept_lengths"]]
    histogram = summary["eval/accept_lengths"]
    assert histogram["values"] == [lengths.count(n) for n in range(1, max(lengths) + 1)]
    assert histogram["bins"] == [n - 0.5 for n in range(1, max(lengths) + 2)]


@pytest.mark.parametrize("name", ["images/tree", "images/calibration"])
def test_a_picture_is_there(file, summary, name):
    logged = summary[name]
    content = (file.parent / "files" / logged["path"]).read_bytes()
    assert content.startswith(b"\x89PNG") and logged["width"] > 1000
    assert hashlib.sha256(content).hexdigest() == logged["sha256"]


def test_the_config_is_nested_and_says_where_it_comes_from(run_dir, file, records):
    found = written.state(file)
    config, run = found["config"], read(run_dir / "run.json")
    assert config["head"]["num_heads"] == 2 and config["model"]["pretrain"]["max_steps"] == 4
    assert config["provenance"]["versions"] == run["versions"]
    assert config["provenance"]["device"] == run["device"]
    (opened,) = of_type(records, "run")
    assert opened["project"] == "heads" and opened["run_group"] == "tests"
    assert opened["job_type"] == "pretrain+inspect+train+calibrate+evaluate+report"
    assert opened["tags"] == ["tiny", "cpu"] and opened["notes"] == "what a test found"
    assert opened["run_id"] == run["wandb"]["id"]
    assert opened["git"]["commit"] == run["git"]["commit"]
    assert found["state"] == "finished" and found["exit_code"] == 0
    assert of_type(records, "stats"), "system metrics"


def test_a_later_call_goes_on_with_the_same_run(home, run_dir, medusa_exp):
    """It takes back what the first evaluation said and the second does not."""
    stale = read(run_dir / "metrics.json")
    run_dir = shutil.copytree(run_dir, run_dir.with_name("later"))
    medusa_exp(
        "stages=[evaluate]",
        "run_dir=later",
        "tree.path=${oc.env:SECRET_CANARY}",
        "evaluate.num_prompts=1",
        "evaluate.baselines=[]",
    )
    _, second = written.run_files(run_dir)
    (opened,) = of_type(written.records(second), "run")
    assert opened["run_id"] == read(run_dir / "run.json")["wandb"]["id"] and opened["resume"]
    assert opened["job_type"] == "pretrain+inspect+train+calibrate+evaluate+report"
    metrics, summary = read(run_dir / "metrics.json"), written.state(second)["summary"]
    assert {name: summary.get(name) for name in metrics} == metrics
    removed = {
        item["key"]
        for record in of_type(written.records(second), "summary")
        for item in record.get("remove", [])
    }
    assert removed == set(stale) - set(metrics) and "eval/baseline_vs_hf" in removed
