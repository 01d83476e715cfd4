"""What W&B has of a run's files, what it must not have, and what its dashboard asks for."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb_dashboard as dashboard
import wandb_files as written
from wandb_files import of_type

from medusa_exp.runs.files import write_json
from medusa_exp.tracking import wandb_artifacts


@pytest.fixture(scope="module")
def artifacts(records) -> list[dict]:
    return of_type(records, "artifact")


def read(path: Path):
    return json.loads(path.read_text())


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


def test_nothing_private_is_sent(home, run_dir, file, records, secrets):
    for record in records:
        for artifact in of_type([record], "artifact"):
            for entry in artifact["manifest"]["contents"]:
                del entry["local_path"]  # where to upload from; W&B sends the file, not this
    sent = [json.dumps(records).encode()]
    folders = (file.parent / "files", run_dir / "wandb" / "staged", run_dir / "wandb" / "artifacts")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for content in [*sent, *(path.read_bytes() for path in files)]:
        for private in (str(home), f'"{os.uname().nodename}"', *secrets):
            assert private.encode() not in content
    config = written.state(file)["config"]
    assert config["tree"]["path"] == "${oc.env:SECRET_CANARY}"
    assert config["cache_dir"] == "~/cache"


def test_no_secret_is_in_any_byte_of_a_run(run_dir, secrets):
    assert len(secrets) > 60
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"report.html", "run.json", "config.yaml"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for number, secret in enumerate(secrets):
            assert secret.encode() not in content, (path, number)


def test_the_heads_say_the_variable_that_names_the_backbone(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS", "/disk/of-somebody")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("model:\n  path: ${oc.env:MODELS}/llama\n")
    place = {"config.json": "backbone", "tokenizer_source.json": "path"}
    for name, key in place.items():
        write_json(tmp_path / "heads" / name, {key: "/disk/of-somebody/llama", "kind": "medusa"})
    item = wandb_artifacts._heads(tmp_path)
    assert item.metadata["backbone"] == "${oc.env:MODELS}/llama"
    (tmp_path / "staged").mkdir()
    for name, key in place.items():
        sent = wandb_artifacts._staged(item.files[name], tmp_path / "staged", tmp_path)
        assert read(sent) == {key: "${oc.env:MODELS}/llama", "kind": "medusa"}


@pytest.mark.parametrize(
    "call",
    [
        ["stages=[report]", "run_dir=copy"],
        ["+experiment=rerun", "rerun.source=copy", "run_dir=again", "stages=[report]"],
    ],
    ids=["continued", "done again"],
)
def test_no_variable_of_a_later_call_is_written_anywhere(run_dir, medusa_exp, secrets, call):
    project = run_dir.parent
    if not (project / "copy").exists():
        shutil.copytree(run_dir, project / "copy")
    own = ("logger.notes=${oc.env:SECRET_CANARY}", "logger.tags=['${oc.env:HOME}']")
    medusa_exp(*call, *own, "tree.path=${oc.env:SECRET_CANARY}")
    out = project / next(word[8:] for word in call if word.startswith("run_dir="))
    *_, newest = sorted(out.glob(".hydra*/config.yaml"), key=lambda path: path.stat().st_mtime)
    assert "notes: ${oc.env:SECRET_CANARY}\n" in newest.read_text()
    leaks = [
        path.relative_to(out)
        for path in out.rglob("*")
        if path.is_file() and secrets[0].encode() in path.read_bytes()
    ]
    assert leaks == []
    opened = of_type(written.records(written.run_files(out)[-1]), "run")[0]
    assert opened["notes"] == "${oc.env:SECRET_CANARY}"
    assert opened["tags"] == ["${oc.env:HOME}"]


def test_all_that_the_dashboard_shows_is_logged(file, records, summary):
    """No panel may wait for a metric that nobody logs."""
    command = [dashboard.__file__, "somebody/heads", "--print"]
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
