"""Keys of caches and checkpoints: what earlier versions have named is found under the same name."""

from types import SimpleNamespace

import pytest
import torch

from medusa_exp.config import Config, ModelConfig, TrainConfig, from_dict, to_dict
from medusa_exp.config import HeadConfig as Head
from medusa_exp.data.prompts import Prompt
from medusa_exp.model.source import ModelSpec
from medusa_exp.stages.regenerate import key_of_responses
from medusa_exp.stages.session import limits_of
from medusa_exp.train.acceptance import responses_key
from medusa_exp.train.checkpointing import training_key
from medusa_exp.train.defaults import settle, with_objective
from medusa_exp.train.precompute import FeatureSettings, features_key, fingerprint_note

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
    attention = ModelSpec(config.model).attention  # the default is named as it always was
    limits = limits_of(config, BACKBONE, TOKENIZER)
    settings = FeatureSettings(config.dtype.precision, attention, config.head.prefix_attention)
    taken = {"loss_form": "recompute"}  # as auto was on a CPU
    sizes = {"vocabulary": 100, "trained": 10, "rate": 2e-3}
    settled = settle(
        with_objective(config.train, config.decode, config.tree), memory=None, **sizes, taken=taken
    )
    sections = (config.head, settled, config.dataset)
    note = fingerprint_note("cache", "files", config.tokenizer, config.model.quantization)
    return {
        "training": training_key(*sections, seed=config.seed, data_key="data", backbone=BACKBONE),
        "regenerated": key_of_responses(config, DOCUMENTS, BACKBONE, TOKENIZER),
        "features": features_key("train", config.dataset, "data", settings, BACKBONE),
        "responses": responses_key([Prompt("a", "b", "c", [1, 2])], limits, BACKBONE, attention),
        "backbone": note.stem,
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
    plain.train = TrainConfig(labels="data", text="regenerated")
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


def test_one_projection_for_all_recurrent_heads_is_what_it_was_before_there_was_a_choice(plain):
    plain.head = Head(kind="recurrent")
    of_each = {}
    for own in (None, False, True):
        plain.head.own_projections = own
        of_each[own] = keys(plain)["training"]
    assert of_each[None] == of_each[False] == "f52458f219bdd34c"
    assert of_each[True] != of_each[None]


def test_old_words_are_said_once_and_are_the_same_training(plain, caplog):
    caplog.set_level("INFO")
    plain.train = TrainConfig(labels="teacher", text="regenerated")
    new = keys(plain)
    for _ in range(2):
        plain.train = TrainConfig(labels="own", text="own")
    assert (plain.train.labels, plain.train.text) == ("teacher", "regenerated")
    assert keys(plain) == new
    saved = to_dict(plain)
    saved["train"] |= {"labels": "own", "text": "own"}  # as runs of earlier versions have it
    assert from_dict(saved) == plain
    assert [message.partition(" ")[0] for message in caplog.messages] == [
        "train.text=own",
        "train.labels=own",
    ]
