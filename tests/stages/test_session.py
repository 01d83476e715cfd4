import logging
from contextlib import nullcontext

import pytest
from omegaconf import OmegaConf

from medusa_exp.config import (
    Config,
    DecodeConfig,
    ExportConfig,
    from_dict,
    to_dict,
)
from medusa_exp.errors import UserError
from medusa_exp.model import build_heads, int8, save_heads
from medusa_exp.stages.session import Session, stop_ids_of


def test_stop_ids(backbone, tokenizer):
    config = Config(decode=DecodeConfig(stop_ids=[5]))
    tokenizer.eos_token = None
    assert stop_ids_of(config, backbone, tokenizer) == {5}
    backbone.model.generation_config.eos_token_id = [2, 3]
    assert stop_ids_of(config, backbone, tokenizer) == {2, 3, 5}


@pytest.mark.parametrize(
    ("stages", "keys", "message"),
    [
        (["train"], {}, None),
        (["train"], {"model": {"path": "/no/model"}}, "model.path=/no/model: there is no such dir"),
        (["export"], {"model": {"path": "/no/model"}}, "model.path=/no/model"),
        (["report"], {"model": {"path": "/no/model"}}, None),
        (["inspect", "report"], {"model": {"path": None}}, None),
        (["train"], {"model": {"path": "somebody/on-the-hub"}}, None),
        (
            ["train"],
            {"dataset": {"path": "/no/chats*.json"}},
            r"/no/chats\*.json: there is no such",
        ),
        (["train"], {"dataset": {"path": "hub:some/chats"}}, None),
        (
            ["evaluate"],
            {"dataset": {"path": None, "sources": {"a": {"path": "/no"}}}},
            "/no: there",
        ),
        (["chat"], {"dataset": {"path": "/no"}}, None),
        (["train"], {"train": {"heads_from": "/no"}}, "train.heads_from=/no holds no heads"),
        (["evaluate"], {"evaluate": {"path": "/no/prompts"}}, "evaluate.path=/no/prompts does not"),
        (["evaluate", "export"], {"export": {"out": "/etc"}}, "export.out=/etc is there already"),
        (["evaluate"], {"export": {"out": "/etc"}}, None),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_begun(
    config, tmp_path, stages, keys, message
):
    config.stages = stages
    plain = to_dict(config)
    for section, values in keys.items():
        plain[section] |= values
    session = Session(from_dict(plain), tmp_path / "run")
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        session.check_places()
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("name", "text"), [("a.json", "[[0], [1]]"), ("b.txt", "\n")])
def test_prompts_that_cannot_be_read_are_told_before_anything_is_begun(
    config, tmp_path, name, text
):
    config.stages, config.evaluate.path = ["train", "evaluate"], str(tmp_path / name)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        Session(config, tmp_path / "run").check_places()
    (tmp_path / name).write_text('[{"messages": [{"role": "user", "content": "Why?"}]}]')
    Session(config, tmp_path / "run").check_places()


@pytest.mark.skipif(not int8.is_supported(), reason="torch without such products")
@pytest.mark.parametrize("is_on", [True, False])
def test_the_config_says_whether_heads_draft_in_integers(
    config, tmp_path, monkeypatch, caplog, is_on
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(int8, "_FEWEST_WEIGHTS", 1)
    config.run_dir, config.decode.int8_heads = str(tmp_path / "run"), is_on
    config.dtype.backbone = "float32"
    session = Session(config, tmp_path / "run")
    save_heads(build_heads(session.backbone(), num_heads=2), tmp_path / "run" / "heads")
    session.decoder(is_tree_known=False)
    assert ("8-bit integers (decode.int8_heads)" in caplog.text) == is_on


def test_a_run_is_opened_whatever_its_last_stage_was_refused_for(tmp_path):
    written = to_dict(Config(export=ExportConfig(format="hf_generate", dtype="bfloat16")))
    written["stages"] = ["train", "export"]  # of which the second once failed, after the first
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(written), tmp_path / ".hydra" / "config.yaml")
    assert Session.of_run(tmp_path).config.export.dtype == "bfloat16"
