import json
from pathlib import Path

import pytest
from report_pages import WHY

from medusa_exp.config import Config
from medusa_exp.runs.record import RunRecord
from medusa_exp.tracking.terminal import headlines, print_summary


def test_what_is_said_first():
    metrics = {
        "eval/speedup": 2.5,
        "eval/speedup_low": 2.31,
        "eval/speedup_high": 2.68,
        "eval/identical_fraction": 0.975,
        "eval/is_lossless": 1.0,
        "eval/tree/b1/speedup": 2.5,
        "eval/tree/b4/speedup": 1.9,
        "calibrate/num_nodes": 8,  # of the fastest tree, while tree=chain was decoded with
        "eval/num_nodes": 5,
        "train/loss": 0.5,
    }
    assert list(headlines(metrics)) == [
        ("speed-up over plain decoding", "2.50x (95 %: 2.31x to 2.68x)"),
        ("answers identical to plain decoding", "97.5%"),
        ("nodes of the tree", "5"),
        ("training loss", "0.500"),
        ("speed-up, 4 prompts at a time", "1.90x"),
    ]


def test_what_became_of_an_adapted_backbone_is_said():
    metrics = {"train/backbone_nats_before": 1.25, "train/backbone_nats_after": 1.5}
    assert list(headlines(metrics)) == [
        ("backbone's held-out loss before it learned", "1.250"),
        ("backbone's held-out loss after it learned", "1.500"),
    ]


def test_what_is_lossy_says_so_before_all_else():
    assert next(headlines({"eval/speedup": 3.0, "eval/is_lossless": 0.0}))[0] == "LOSSY"


@pytest.mark.parametrize(
    ("stage", "is_older", "said"),
    [
        ("report", True, "report: x[a]/report.html"),
        ("evaluate", True, "'stages=[report]' writes it again"),
        ("evaluate", False, "run directory: x[a]"),
        ("chat", True, "run directory: x[a]"),
    ],
)
def test_no_report_of_an_earlier_call_is_offered_as_this_one(
    tmp_path, monkeypatch, capsys, stage, is_older, said
):
    monkeypatch.chdir(tmp_path)
    out = Path("x[a]")
    out.mkdir()
    if is_older:
        (out / "report.html").touch()
    record = RunRecord(out, Config(name="x", stages=[stage], device="cpu"), [])
    record.run["stages"][stage] = {"seconds": 1.0}
    print_summary(record)
    assert capsys.readouterr().out.rstrip().endswith(said)


def test_numbers_of_an_earlier_call_are_not_told_as_those_of_this_one(tmp_path, capsys):
    said = {}
    for stages in (["evaluate"], ["export"], ["chat"], ["export", "report"]):
        record = RunRecord(tmp_path, Config(name="x", stages=stages, device="cpu"), [])
        for stage in stages:
            found = {"evaluate": {"eval/speedup": 2.5}, "chat": {"chat/tokens_per_step": 3.0}}
            record.run["stages"][stage] = {"seconds": 1.0}
            record.merge_metrics(stage, found.get(stage, {}))
        print_summary(record)
        said["+".join(stages)] = "2.50x" in capsys.readouterr().out
    assert said == {"evaluate": True, "export": False, "chat": False, "export+report": True}


def test_why_it_is_not_more_is_said_after_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "why.json").write_text(json.dumps(WHY))
    for stages in (["evaluate", "report"], ["train"]):
        record = RunRecord(tmp_path, Config(name="x", stages=stages, device="cpu"), [])
        record.run["stages"] |= {stage: {"seconds": 1.0} for stage in stages}
        print_summary(record)
    said = capsys.readouterr().out
    assert said.count("why not more?") == said.count("heads and drafting") == 1
    assert "-0.57x  -23%" in said and "+0.05x   +2%" in said and "-0.84x  -34%" in said
    assert "2.50x  100 %" in said and "1.62x" in said and "host" not in said
    assert "take head=medusa_tied." in said and "From 7 prompts at a time on" in said
