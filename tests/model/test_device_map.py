"""Backbones that accelerate places. Here there is one device, the CPU: what several would want of
decoding and training is only that nothing takes all layers to be on one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model

from medusa_exp.config import Config, ModelConfig, TrainConfig
from medusa_exp.errors import UserError
from medusa_exp.model import loading
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.source import ModelSpec


@pytest.fixture
def place(tmp_path) -> Path:
    build_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def placed(path: Path, device_map: str | None = "auto") -> ModelSpec:
    return ModelSpec(ModelConfig(path=str(path), device_map=device_map), device="cpu")


def test_on_a_cpu_it_is_the_same_model(place):
    backbone = load_backbone(placed(place))

    whole = load_backbone(placed(place, None))
    ids_BT = torch.arange(6)[None]
    assert torch.equal(backbone.hidden_states(ids_BT), whole.hidden_states(ids_BT))
    assert backbone.weights_fingerprint() == whole.weights_fingerprint()
    assert not backbone.is_spread


def test_layers_on_several_devices_are_known(place):
    backbone = load_backbone(placed(place))
    backbone.model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": 1}

    assert backbone.is_spread


def test_a_gpu_gets_what_was_asked_for(place, monkeypatch):
    monkeypatch.setattr(loading, "pick_device", lambda device: torch.device("cuda"))

    assert loading._placement(placed(place)) == {"device_map": "auto"}


def test_what_does_not_fit_is_not_offloaded(place, monkeypatch):
    def offloads(path, **options):
        with torch.device("meta"):
            model = torch.nn.Linear(2, 2)
        return model, {"missing_keys": []}

    monkeypatch.setattr(loading, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=offloads))
    with pytest.raises(UserError, match=r"model\.device_map=auto: the GPUs have no room for all"):
        load_backbone(placed(place))


def test_without_accelerate(place, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"model\.device_map=auto needs accelerate: pip install"):
        load_backbone(placed(place))


def test_one_process_has_all_devices(place):
    with pytest.raises(UserError, match=r"train\.strategy \(with model\.device_map\)=ddp"):
        Config(
            model=ModelConfig(path=str(place), device_map="auto"),
            train=TrainConfig(strategy="ddp", devices=2),
        )
