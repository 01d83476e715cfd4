"""The jobs of a sweep on disk."""

import logging
import sys

import pytest
from cli_runs import flip

from medusa_exp import cli
from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.runs.files import write_json
from medusa_exp.runs.jobs import JOB, held, read_jobs
from medusa_exp.runs.record import RunRecord
from medusa_exp.runs.seals import check_config
from medusa_exp.runs.sweep import _hydra_subdir, run_once

RECORD = {"number": 0, "overrides": [], "objective": "", "status": "done", "value": None}


def test_a_damaged_record_is_told_and_the_others_are_read(tmp_path, caplog):
    for name in "abc":
        (tmp_path / name).mkdir()
    write_json(tmp_path / "a" / JOB, RECORD)
    (tmp_path / "b" / JOB).write_text("{")
    write_json(tmp_path / "c" / JOB, {"status": "done"})
    with caplog.at_level(logging.WARNING):
        assert read_jobs(tmp_path) == {"a": RECORD}
    assert str(tmp_path / "b" / JOB) in caplog.text
    assert f"{tmp_path / 'c' / JOB} is not what was written there" in caplog.text


def test_a_job_that_nobody_holds_is_interrupted(tmp_path):
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / JOB, {**RECORD, "status": "running"})
    assert read_jobs(tmp_path)["a"]["status"] == "interrupted"


def test_a_job_that_is_tried_again_is_sealed_as_it_is_then(tmp_path, monkeypatch):
    def tried(*more):
        given = ["-m", "+experiment=smoke", "stages=[evaluate]", "logger=none", *more]
        given += [f"sweep_dir={tmp_path}", f"cache_dir={tmp_path}/cache"]
        monkeypatch.setattr(sys, "argv", ["medusa_exp", *given])
        # Hydra shows a traceback where somebody traces, as coverage does.
        monkeypatch.setattr(cli.hydra_utils, "is_under_debugger", lambda: False)
        for place, name in ((cli.hydra_utils, "run_and_report"), (logging.Handler, "handleError")):
            monkeypatch.setattr(place, name, getattr(place, name))  # and put back what main puts
        with pytest.raises(SystemExit):
            cli.main()

    def refuses(*given):
        raise UserError("as a later version may")

    tried("objective=eval/is_lossless")
    (out,) = [path.parent for path in tmp_path.glob(f"*/{JOB}")]
    before = (out / ".hydra/overrides.yaml").read_text()
    monkeypatch.setattr(cli, "_checked_config", refuses)
    tried("objective=eval/speedup")
    assert (out / ".hydra/overrides.yaml").read_text() != before
    check_config(out)


def test_nobody_writes_the_config_of_a_job_that_is_being_done(tmp_path):
    """Hydra would, before it is known that another process is at it: of one that goes on later."""
    assert _hydra_subdir(str(tmp_path / "new")) == ".hydra"
    assert _hydra_subdir(str(tmp_path)) == ".hydra"
    with held(tmp_path):
        assert _hydra_subdir(str(tmp_path)) is None
    assert _hydra_subdir(str(tmp_path)) == ".hydra"


def test_the_numbers_of_a_job_that_is_done_are_not_believed_unread(tmp_path):
    RunRecord(tmp_path, Config(device="cpu"), []).merge_metrics("train", {"train/loss": 1.0})
    write_json(tmp_path / JOB, {**RECORD, "objective": "train/loss", "value": 1.0})
    given = tmp_path, None, lambda: None, "train/loss", lambda _: None
    assert run_once(*given) == 1.0
    flip(tmp_path / "metrics.json", (tmp_path / "metrics.json").read_bytes().index(b"1.0"))
    with pytest.raises(UserError, match=r"metrics\.json is not what was written"):
        run_once(*given)
