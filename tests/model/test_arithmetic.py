"""What a backbone is loaded in where the processor has no arithmetic for its own type."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build_model

from medusa_exp.config import ModelConfig
from medusa_exp.model import loading
from medusa_exp.model.source import ModelSpec
from medusa_exp.runs import machine
from medusa_exp.train.trainer import pick_precision


@pytest.fixture
def spec(tmp_path: Path, monkeypatch) -> ModelSpec:
    """Return a model in bfloat16, where nothing but float32 has arithmetic."""
    build_model("llama").bfloat16().save_pretrained(tmp_path)

    def only_float32(device, dtype):
        return dtype == torch.float32

    monkeypatch.setattr(loading, "has_arithmetic", only_float32)
    loading._say_float32.cache_clear()
    return ModelSpec(ModelConfig(path=str(tmp_path)), device="cpu")


@pytest.mark.parametrize("is_said", [True, False])  # by its config; else its files alone have it
def test_auto_is_float32_and_one_line_says_so(spec, caplog, is_said):
    caplog.set_level("INFO")
    file = Path(spec.model.path) / "config.json"
    config = json.loads(file.read_text())
    if not is_said:
        file.write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    half = loading.load_backbone(replace(spec, dtype="bfloat16"))
    assert half.model.dtype == torch.bfloat16 and not caplog.messages
    whole = loading.load_backbone(spec)
    assert {tensor.dtype for tensor in whole.model.parameters()} == {torch.float32}
    [line] = caplog.messages
    assert "stored in bfloat16" in line and "dtype.backbone=bfloat16 keeps it" in line
    assert whole.identity() == half.identity()
    assert whole.weights_fingerprint() == half.weights_fingerprint()
    ids = torch.arange(8)[None]
    expected = loading.load_backbone(replace(spec, dtype="float32")).hidden_states(ids)
    assert torch.equal(whole.hidden_states(ids), expected)
    ends = loading.load_ends(spec, whole.identity(), whole.weights_fingerprint())
    assert ends.model.dtype == torch.float32


def test_auto_keeps_what_has_arithmetic(spec, monkeypatch):
    monkeypatch.setattr(loading, "has_arithmetic", lambda device, dtype: True)
    assert loading.load_backbone(spec).model.dtype == torch.bfloat16


def test_training_takes_the_same_for_auto(monkeypatch):
    for has, word in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr("medusa_exp.train.trainer.has_arithmetic", lambda *given, h=has: h)
        assert pick_precision("auto", torch.device("cpu")) == word
        assert pick_precision("16-mixed", torch.device("cpu")) == "16-mixed"
    assert pick_precision("auto", torch.device("cuda")) == "16-mixed"
    assert not machine.has_arithmetic(torch.device("mps"), torch.bfloat16)
