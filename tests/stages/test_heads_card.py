"""The card of a run's heads: what it says, what it does not know, and what it never names."""

import json
import os
from pathlib import Path

import pytest
import yaml

from medusa_exp.config import Config, DatasetConfig, DecodeConfig, HeadConfig, ModelConfig
from medusa_exp.errors import UserError
from medusa_exp.stages.heads_card import CARD, license_of, write_card

METRICS = {"eval/speedup": 2.5, "eval/speedup_low": 2.31, "eval/speedup_high": 2.68}


def run_of(out: Path, model: Path | str, **config) -> Config:
    (out / "heads").mkdir(parents=True)
    heads = {"kind": "medusa", "num_heads": 5}
    run = {"created": "2026-03-01T10:00:00+00:00", "device": "cuda: H200"}
    files = {"heads/config.json": heads, "run.json": run, "metrics.json": METRICS}
    for name, value in files.items():
        (out / name).write_text(json.dumps(value))
    return Config(name="quick", model=ModelConfig(path=str(model)), device="cpu", **config)


def written(config: Config, out: Path) -> tuple[dict, str]:
    write_card(config, out)
    text = (out / "heads" / CARD).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_has_base_model_figures_device_and_date(tmp_path):
    metadata, body = written(run_of(tmp_path, "meta/llama"), tmp_path)
    assert metadata["base_model"] == "meta/llama" and metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "medusa-exp" and metadata["license"] == "unknown"
    assert "5 Medusa heads of kind medusa for meta/llama" in body
    assert "| speed-up over plain decoding | 2.50x (95 %: 2.31x to 2.68x) |" in body
    assert "on cuda: H200, 2026-03-01." in body
    assert 'from_pretrained("meta/llama")' in body and "License of the target: unknown" in body


def test_a_card_names_the_heads_that_auto_has_become(tmp_path):
    config = run_of(tmp_path, "meta/llama", head=HeadConfig(kind="auto"))
    heads = {"kind": "recurrent", "num_heads": 4, "num_layers": 1, "num_tokens": 16384}
    (tmp_path / "heads" / "config.json").write_text(json.dumps(heads))
    _, body = written(config, tmp_path)
    assert "| heads | 4 of kind recurrent |" in body and "auto" not in body
    assert "| tokens that they know | 16384 |" in body


def test_a_card_names_the_loss_that_was_taken(tmp_path):
    """Not what auto would be by now, with decoding set otherwise."""
    config = run_of(tmp_path, "meta/llama", decode=DecodeConfig(rule="sampling"))
    assert "| labels, loss | teacher, unknown |" in written(config, tmp_path)[1]
    record = {"stages": {"train": {"settled": {"loss": "ce"}}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "| labels, loss | teacher, ce |" in written(config, tmp_path)[1]
    (tmp_path / "run.json").write_text("{}")
    config.train.loss = "kl"
    assert "| labels, loss | teacher, kl |" in written(config, tmp_path)[1]


@pytest.mark.parametrize("text", ["[]", "3", '{"kind": "medusa"'])
def test_a_config_that_is_none_makes_no_card(tmp_path, text):
    config = run_of(tmp_path, "meta/llama")
    (tmp_path / "heads" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not"):
        write_card(config, tmp_path)


def test_a_directory_in_the_place_of_the_card(tmp_path):
    config = run_of(tmp_path, "meta/llama")
    (tmp_path / "heads" / CARD).mkdir()
    with pytest.raises(UserError, match=r"README\.md is a directory"):
        write_card(config, tmp_path)


def test_a_card_names_no_place_of_this_machine(tmp_path):
    model = tmp_path / "private" / "my-llama"
    model.mkdir(parents=True)
    (model / CARD).write_text("---\nlicense: apache-2.0\n---\n# My llama\n")
    data = DatasetConfig(path=str(tmp_path / "private" / "chats.json"))
    metadata, body = written(run_of(tmp_path / "run", model, dataset=data), tmp_path / "run")
    assert "base_model" not in metadata and str(tmp_path) not in body
    assert "`my-llama` (a local directory)" in body and "| data | chats.json |" in body
    assert "License of the target, by its own card: apache-2.0." in body


@pytest.mark.parametrize("model", ["../llama", "my models/llama", "~/llama"])
def test_a_directory_that_is_not_here_is_no_name_on_the_hub(tmp_path, model):
    """The path is relative to another folder than that of this call."""
    metadata, body = written(run_of(tmp_path, model), tmp_path)
    assert "base_model" not in metadata and "`llama` (a local directory)" in body
    assert "License of the target: unknown" in body


def test_heads_that_are_linked_from_another_run_keep_their_card_there(tmp_path):
    config = run_of(tmp_path / "new", "meta/llama", heads_from="runs/old")
    (tmp_path / "old").write_text("the old card")
    os.link(tmp_path / "old", tmp_path / "new" / "heads" / CARD)
    _, body = written(config, tmp_path / "new")
    assert "| heads | taken from old: see there |" in body
    assert (tmp_path / "old").read_text() == "the old card"


def test_a_card_that_says_the_same_is_not_written_again(tmp_path):
    config = run_of(tmp_path, "meta/llama")
    write_card(config, tmp_path)
    before = (tmp_path / "heads" / CARD).stat()
    write_card(config, tmp_path)
    assert (tmp_path / "heads" / CARD).stat().st_ino == before.st_ino


def test_no_heads_no_card(tmp_path):
    write_card(Config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense: [mit]\n---\n", "unknown"),
        ("---\nlicense: 'a | b\n\n# c'\n---\n", "a b c"),
        ("---\n- x\n---\n", "unknown"),
        ("---\n{\n---\n", "unknown"),
        ("# no metadata\n---\nlicense: mit\n---\n", "unknown"),
        ("\udcff", "unknown"),
    ],
)
def test_the_license_is_what_the_models_own_card_says(tmp_path, card, license):
    (tmp_path / CARD).write_text(card, errors="surrogateescape")
    assert license_of(str(tmp_path)) == license


def test_no_card_no_license(tmp_path):
    for model in (None, str(tmp_path), str(tmp_path / "none"), "owner/never-downloaded"):
        assert license_of(model) == "unknown"
