"""One training in two processes, over gloo."""

import json
import re

import pytest
import torch

from medusa_exp.errors import UserError
from medusa_exp.model import load_heads
from medusa_exp.provenance import RunRecord
from medusa_exp.train import stage


def run(config, out):
    out.mkdir(exist_ok=True)
    with RunRecord(out, config, []).stage("train"):
        return stage.run(config, out)


def steps(out):
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does_with_twice_the_micro_batches(config, tmp_path, strategy):
    config.dtype.precision = "32-true"
    config.decode.max_new_tokens, config.train.max_steps = 8, 5
    config.train.accumulate = 2
    one = run(config, tmp_path / "one")
    config.train.accumulate, config.train.strategy, config.train.devices = 1, strategy, 2
    two = run(config, tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4) and "val/accept_length" in two
    heads = [load_heads(tmp_path / n / "heads").state_dict() for n in ("one", "two")]
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-3, atol=1e-4)
    assert steps(tmp_path / "two") == steps(tmp_path / "one")  # each line is written once
    run_json = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run_json["stages"]["train"]["resumed_from_step"] == 0
    if strategy == "fsdp":
        found = run_json["stages"]["train"]["backbone_bytes"]
        assert found["kept"] < 0.8 * found["whole"]


def test_what_a_process_says_is_what_the_stage_says(config, tmp_path):
    config.train.strategy, config.train.devices = "ddp", 2
    config.train.learning_rate, config.train.warmup_fraction = 1e20, 0.0
    with pytest.raises(UserError) as caught:
        run(config, tmp_path / "run")
    assert re.search(r"the loss is (nan|inf) at step \d+, on conversations", str(caught.value))
