"""The record files of a run directory."""

import pytest

from medusa_exp.config import Config
from medusa_exp.files import read_json
from medusa_exp.provenance import RunRecord


def test_no_figure_outlives_its_stage_however_that_ended_between(tmp_path):
    config = Config(device="cpu")

    def run(metrics):
        record = RunRecord(tmp_path, config, ["python", "-m", "medusa_exp"])
        with record.stage("evaluate"):
            if metrics is None:
                raise RuntimeError("it fails")
            record.merge_metrics("evaluate", metrics)

    run({"eval/speedup": 1.0, "eval/tree/b4/speedup": 2.0})
    with pytest.raises(RuntimeError, match="it fails"):
        run(None)
    run({"eval/speedup": 3.0})
    assert read_json(tmp_path / "metrics.json") == {"eval/speedup": 3.0}


def test_a_figure_that_is_no_number_is_told_and_left_out(tmp_path, caplog):
    record = RunRecord(tmp_path, Config(device="cpu"), [])
    with record.stage("evaluate"):
        pass
    assert record.merge_metrics("evaluate", {"a": float("nan"), "b": 1.0}) == {"b": 1.0}
    assert read_json(tmp_path / "metrics.json") == {"b": 1.0}
    assert read_json(tmp_path / "run.json")["stages"]["evaluate"]["metrics"] == ["b"]
    assert "stage evaluate: not finite, and left out: a" in caplog.text
