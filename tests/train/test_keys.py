"""Keys of caches and checkpoints: what earlier versions have named is found under the same name."""

from types import SimpleNamespace

import pytest
import torch

from medusa_exp.config import Config, ModelConfig
from medusa_exp.config import HeadConfig as Head
from medusa_exp.train.acceptance import _path
from medusa_exp.train.checkpointing import made_with
from medusa_exp.train.precompute import _note, features_key
from medusa_exp.train.regenerated import regenerated_key
from medusa_exp.data.prompts import Prompt

BACKBONE = SimpleNamespace(
    weights_fingerprint=lambda: "weights",
    device=torch.device("cpu"),
    model=SimpleNamespace(dtype=torch.float32),
    vocab_size=100,
    eos_token_ids={2},
)
TOKENIZER = SimpleNamespace(eos_token_id=3, decode=str)
DOCUMENTS = SimpleNamespace(summary={"key": "documents"})


def keys(config: Config) -> dict[str, str]:
    return {
        "training": made_with(config, "data", BACKBONE),
        "regenerated": regenerated_key(config, DOCUMENTS, BACKBONE, TOKENIZER),
        "features": features_key(config, "train", "data", BACKBONE),
        "responses": _path(config, TOKENIZER, [Prompt("a", "b", "c", [1, 2])], BACKBONE).stem,
        "backbone": _note(config, "files").stem,
    }


@pytest.fixture
def plain(monkeypatch) -> Config:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    config = Config()
    config.dtype.precision = "bf16-mixed"
    return config


def test_of_the_defaults(plain):
    assert keys(plain) == {
        "backbone": "46ba86311bc09529",
        "features": "54c51ca48fdf4d41",
        "regenerated": "6af76198a29b76d0",
        "responses": "1524b029630487b2",
        "training": "51cbf33b7a566adc",
    }


def test_of_other_settings(plain):
    plain.seed, plain.model = 5, ModelConfig(path="x", attn_implementation="eager")
    plain.head = Head(num_heads=3, kind="medusa_lowrank", rank=16, prefix_attention=True)
    plain.train.labels = "data"
    plain.train.text = "own"
    plain.train.patience, plain.train.learning_rate = 3, 1e-3
    plain.dtype.precision = "32-true"
    plain.decode.rule, plain.decode.stop_strings = "typical", ["User:"]
    plain.regenerate.num_documents, plain.regenerate.batch_size = 10, 7
    plain.tokenizer.add_bos_token = True
    assert keys(plain) == {
        "backbone": "cd813794891b4f95",
        "features": "cd6a38d2dcd61540",
        "regenerated": "3c200c8d4fabe97d",
        "responses": "5a9d83c31f5e16c9",
        "training": "599920deaa230357",
    }
