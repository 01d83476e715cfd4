"""The history, and its CSV, which go on without W&B."""

import os
import subprocess
import sys

from medusa_exp.config import Config
from medusa_exp.runs.files import read_jsonl, write_json, write_jsonl
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking import wandb_run
from medusa_exp.tracking.history import HistoryLogger
from medusa_exp.tracking.tracker import Tracker


def test_what_json_cannot_say_is_left_out_of_history_and_mirror(tmp_path):
    mirrored = []
    logger = HistoryLogger(tmp_path, "train", lambda *step: mirrored.append(step))
    logger.log_metrics({"train/loss": 3.0, "train/bad": float("nan"), "epoch": 0}, 1)
    assert mirrored == [("train", 1, {"train/loss": 3.0})]
    assert read_jsonl(tmp_path / "history.jsonl") == [
        {"stage": "train", "step": 1, "train/loss": 3.0}
    ]


def test_a_run_goes_on_where_wandb_does_not_start(tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(wandb_run, "_settings", fail)
    config = Config(name="x", device="cpu")
    with Tracker(RunRecord(tmp_path, config, [])) as tracker:
        tracker.stage_done("train")
    assert "W&B did not start" in caplog.text and "no space left" in caplog.text


def test_a_run_goes_on_where_wandb_cannot_be_imported(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("medusa_exp.tracking.wandb_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(RunRecord(tmp_path, Config(name="x", device="cpu"), [])) as tracker:
        tracker.stage_done("train")
    assert "logger=wandb needs wandb: pip install" in caplog.text


def test_csv_files_are_utf_8_whatever_the_system_writes(tmp_path):
    """A category may be in any language."""
    write_json(tmp_path / "metrics.json", {"eval/category/\u6570\u5b66/speedup": 1.5})
    rows = [{"train/loss": 5.0, "train/rate": 0.1}, {"val/loss": 4.0}, {"train/loss": 3.0}]
    steps = zip((1, 2, 1), rows, strict=True)  # the first was made again
    history = [{"stage": "train", "step": step, **row} for step, row in steps]
    write_jsonl(tmp_path / "history.jsonl", history)
    code = "from pathlib import Path; from medusa_exp.tracking.tracker import _write_csv\n"
    code += f"_write_csv(Path({str(tmp_path)!r}))"
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **ascii_alone}, check=True)
    metrics = (tmp_path / "metrics.csv").read_text("utf-8").splitlines()
    assert metrics == ["name,value", "eval/category/\u6570\u5b66/speedup,1.5"]
    assert (tmp_path / "history.csv").read_text("utf-8").splitlines() == [
        "stage,step,train/loss,train/rate,val/loss",
        "train,1,3.0,0.1,",
        "train,2,,,4.0",
    ]
