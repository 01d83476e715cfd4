"""The jobs of a sweep on disk."""

import logging

from medusa_exp.runs.files import write_json
from medusa_exp.runs.jobs import JOB, read_jobs

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
