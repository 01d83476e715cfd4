"""A run of every stage with W&B offline, read back from its .wandb file by W&B's own reader."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb_files as written
from wandb_files import of_type

from medusa_exp.tracking import dashboard
from medusa_exp.tracking.wandb_metrics import AXES, BEST

CANARY = "canary-of-an-environment-variable"


def medusa_exp(home: Path, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "medusa_exp", *arguments],
        cwd=home / "project",
        env={
            **os.environ,
            "HOME": str(home),
            "SECRET_CANARY": CANARY,
            "SLURM_JOB_ID": "1",
            "SLURM_SUBMIT_DIR": f"{home}/{CANARY}",
            "WANDB_API_KEY": "c0ffee" * 7,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "is missing" not in result.stdout + result.stderr  # a warning of wandb_stage


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wandb") / "home-of-somebody"
    (path / "project").mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def run_dir(home) -> Path:
    """A run in somebody's home, with a value from the environment in its config."""
    medusa_exp(
        home,
        "+experiment=smoke",
        "stages=[pretrain,inspect,train,calibrate,evaluate,report]",
        "run_dir=run",
        f"cache_dir={home}/cache",
        "tree.path=${oc.env:SECRET_CANARY}",
        "train.features=cache",
        "device=cpu",
        "logger=wandb",
        "logger.project=heads",
        "logger.group=tests",
        "logger.tags=[tiny,cpu]",
        "logger.notes='what a test found'",
    )
    return home / "project" / "run"


@pytest.fixture(scope="module")
def file(run_dir) -> Path:
    (only,) = written.run_files(run_dir)
    return only


@pytest.fixture(scope="module")
def records(file) -> list[dict]:
    return written.records(file)


@pytest.fixture(scope="module")
def summary(file) -> dict:
    return written.state(file)["summary"]


@pytest.fixture(scope="module")
def artifacts(records) -> list[dict]:
    return of_type(records, "artifact")


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
    for pattern, better in BEST.items():
        assert defined[pattern]["summary"] == {better: True}
        assert defined[pattern]["step_metric"] == "train/step"
    for pattern, axis in AXES.items():
        assert defined[pattern]["step_metric"] == axis
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


def test_artifacts_hold_what_the_run_directory_promises(home, run_dir, artifacts):
    def digest(path: Path) -> str:
        return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()

    outputs = {a["name"]: a for a in artifacts if not a.get("use_after_commit")}
    promised = {
        "smoke-heads": ["heads/model.safetensors", "heads/config.json", "heads/tokenizer.json"],
        "smoke-tree": ["tree.json", "calibration.json"],
        "smoke-evaluation": ["metrics.json", "records.jsonl", "samples.jsonl"],
        "smoke-report": ["report.html"],
    }
    private = {str(home), str(home.resolve())}
    for name, files in promised.items():
        entries = {entry["path"]: entry for entry in outputs[name]["manifest"]["contents"]}
        assert set(map(os.path.basename, files)) <= set(entries)
        for place in files:
            source, entry = run_dir / place, entries[Path(place).name]
            staged = Path(entry["local_path"])
            assert entry["digest"] == digest(staged)
            if not any(path in source.read_text("utf-8", "ignore") for path in private):
                assert staged.read_bytes() == source.read_bytes()
    code = {entry["path"] for entry in outputs["medusa_exp-source"]["manifest"]["contents"]}
    assert {"cli.py", "model/loss.py"} <= code


def test_lineage_goes_from_data_to_the_evaluation(run_dir, artifacts):
    order = [
        (a["type"], bool(a.get("use_after_commit"))) for a in artifacts if "smoke" in a["name"]
    ]
    assert order == [
        ("dataset", True),
        ("features", True),
        ("model", False),
        ("tree", False),
        ("model", True),
        ("tree", True),
        ("evaluation", False),
        ("report", False),
    ]
    weights = (run_dir / "heads" / "model.safetensors").read_bytes()
    by_kind = {a["type"]: json.loads(a["metadata"]) for a in artifacts if "metadata" in a}
    sha256 = hashlib.sha256(weights).hexdigest()
    assert by_kind["evaluation"]["made_from"]["heads"] == by_kind["model"]["sha256"] == sha256
    outputs = [json.loads(a["metadata"]) for a in artifacts if a["type"] == "model"]
    made_from = outputs[0]["made_from"]
    assert made_from["dataset"]["key"] == read(run_dir / "data.json")["key"]
    known = read(run_dir / "run.json")["stages"]["train"]["features"]
    assert {s: found["key"] for s, found in made_from["features"].items()} == known


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


def test_nothing_private_is_sent(home, run_dir, file, records):
    for record in records:
        for artifact in of_type([record], "artifact"):
            for entry in artifact["manifest"]["contents"]:
                del entry["local_path"]  # where to upload from; W&B sends the file, not this
    sent = [json.dumps(records).encode()]
    folders = (file.parent / "files", run_dir / "wandb" / "staged", run_dir / "wandb" / "artifacts")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for content in [*sent, *(path.read_bytes() for path in files)]:
        for private in (str(home), CANARY, "c0ffee" * 7, os.uname().nodename + '"'):
            assert private.encode() not in content
    config = written.state(file)["config"]
    assert config["tree"]["path"] == "${oc.env:SECRET_CANARY}"
    assert config["cache_dir"] == "~/cache"


def test_all_that_the_dashboard_shows_is_logged(file, records, summary):
    """No panel may wait for a metric that nobody logs."""
    command = ["-m", "medusa_exp.tracking.dashboard", "somebody/heads", "--print"]
    shown = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    sections = json.loads(shown.stdout)["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Overview",
        "Training",
        "Acceptance by head and depth",
        "Speed-up against tree size",
        "Sweep comparison",
        "Kernels",
    ]
    panels = [panel for section in sections for panel in section["panels"]]
    logged = {name for row in of_type(records, "history") for name in row["item"]}
    logged |= {name.partition(".")[0] for name in logged}  # a histogram or a table is nested
    named = set(_metric_names(panels))
    assert len(named) > 25
    assert sorted(named - {*logged, *summary, "_step"}) == []
    patterns = {panel["config"].get("metricRegex") for panel in panels} - {None}
    for pattern in patterns:
        assert any(name.startswith(pattern.removesuffix("[0-9]+")) for name in logged), pattern
    config = written.state(file)["config"]
    for key in dashboard.SWEPT:
        group, _, name = key.partition(".")
        assert name in config[group], key
    accessors = json.dumps([panel["config"].get("columns") for panel in panels])
    assert all(f"config:{k.replace('.', '.value.')}" in accessors for k in dashboard.SWEPT)


def _metric_names(panels: list[dict]):
    for panel in panels:
        config = panel["config"]
        yield from config.get("metrics", [])
        yield from config.get("mediaKeys", [])
        axes = [config.get("xAxis"), config.get("yAxis"), config.get("targetKey")]
        axes += [column["accessor"] for column in config.get("columns", [])]
        found = [axis for axis in axes if axis and not axis.startswith("config:")]
        yield from (axis.removeprefix("summary:") for axis in found)
        if panel["viewType"] == "Weave":
            yield config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


def test_a_later_call_goes_on_with_the_same_run(home, run_dir, file):
    """It takes back what the first evaluation said and the second does not."""
    stale = read(run_dir / "metrics.json")
    medusa_exp(
        home,
        "stages=[evaluate]",
        "run_dir=run",
        "evaluate.num_prompts=1",
        "evaluate.baselines=[]",
    )
    first, second = written.run_files(run_dir)
    assert first == file
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
