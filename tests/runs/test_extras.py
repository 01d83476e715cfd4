"""A run without the packages that draw its report, or that talk to W&B, ends well and says so."""

import json
import logging
import sys
from pathlib import Path

import pytest

from medusa_exp import cli
from medusa_exp.config import Config, LoggerConfig, ModelConfig
from medusa_exp.errors import UserError
from medusa_exp.runs.extras import lacking
from medusa_exp.runs.record import RunRecord
from medusa_exp.stages import report
from medusa_exp.tracking.tracker import Tracker


@pytest.fixture
def bare(monkeypatch):
    """Make it look as if no extra was installed."""
    for module in ("altair", "vl_convert", "wandb", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)


def test_what_is_installed_lacks_nothing():
    assert lacking("report", "x") is None and lacking("wandb", "x") is None


def test_what_is_missing_is_named_with_the_command(bare):
    text = "x needs altair and vl_convert: pip install 'medusa-exp[report]'"
    assert lacking("report", "x") == text


def run_stages(config: Config, out: Path, monkeypatch) -> None:
    monkeypatch.setattr("medusa_exp.stages.chat.run", lambda *_: {"chat/tokens_per_step": 2.5})
    cli.run_stages(config, out, ["python", "-m", "medusa_exp"])


def test_a_report_that_cannot_be_drawn_ends_no_run(bare, tmp_path, monkeypatch, caplog, capsys):
    logger = LoggerConfig(kind="csv")
    model = ModelConfig(path="some/model")
    config = Config(stages=["chat", "report"], device="cpu", logger=logger, model=model)
    with caplog.at_level(logging.WARNING):
        run_stages(config, tmp_path, monkeypatch)
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "pip install 'medusa-exp[report]'" in said and f"run_dir={tmp_path}" in said
    assert not (tmp_path / "report.html").exists()
    run = json.loads((tmp_path / "run.json").read_text())
    assert {stage: entry["status"] for stage, entry in run["stages"].items()} == {
        "chat": "done",
        "report": "done",
    }
    assert "run directory:" in capsys.readouterr().out


def test_a_report_alone_that_cannot_be_drawn_is_an_error(bare, tmp_path):
    with pytest.raises(UserError, match=r"medusa-exp\[report\]"):
        report.run(Config(stages=["report"]), tmp_path)


def test_a_sweep_goes_on_without_its_page(bare, tmp_path, caplog):
    cli._write_page(tmp_path)
    assert "the page of a sweep needs altair" in caplog.text and not list(tmp_path.iterdir())


def test_files_alone_where_wandb_is_not_installed(bare, tmp_path, caplog):
    record = RunRecord(tmp_path, Config(device="cpu"), [])
    with caplog.at_level(logging.WARNING), Tracker(record) as tracker:
        assert tracker.run is None
    [said] = caplog.messages
    assert "logger=wandb needs wandb" in said and "medusa-exp[wandb]" in said


def test_who_asks_for_wandb_online_has_to_have_it(bare, tmp_path):
    config = Config(device="cpu", logger=LoggerConfig(mode="online"))
    with (
        pytest.raises(UserError, match=r"medusa-exp\[wandb\]"),
        Tracker(RunRecord(tmp_path, config, [])),
    ):
        pass
