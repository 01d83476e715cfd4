"""What is given in vain is said, with the choice that would use it."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from medusa_exp.cli import compose
from medusa_exp.config import Config
from medusa_exp.config.ignored import USES, _names, _value, say_ignored
from medusa_exp.config.limits import OneOf
from medusa_exp.errors import UserError

ONE_HEAD = ("head.num_heads=1", "stages=[train]")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
GIVEN = {
    "tree.paths": ("[[0]]", "tree.kind=custom"),
    "decode.top_k": ("3", "decode.rule=sampling"),
    "decode.temperature": ("0.5", "decode.rule=sampling or typical"),
    "train.lora.rank": ("4", "train.kind=medusa2"),
    "train.lora": ("{rank: 4}", "train.kind=medusa2"),
    "model.pretrain.max_steps": ("7", "model.kind=tiny"),
    "train.top_k": ("3", "train.loss=topk_kl (it is auto), or with train.teacher=top_k"),
    "serving.patience": ("3", "regenerate.server=something (it is null)"),
    "logger.project": ("x", "logger.kind=wandb"),
}


def say(overrides: list[str]) -> None:
    """As `compose` does, in no time."""
    config = Config()
    for override in overrides:
        key, value = override.split("=", 1)
        name = place_of(key)[1]
        if not is_dataclass(_value(config, key)):
            place = key.rpartition(".")[0]
            setattr(_value(config, place) if place else config, name, yaml.safe_load(value))
        else:
            for inner, one in yaml.safe_load(value).items():
                setattr(_value(config, key), inner, one)
    say_ignored(config, overrides)


def place_of(key: str) -> tuple[type, str]:
    section, _, name = key.rpartition(".")
    return type(_value(Config(), section) if section else Config()), name


@pytest.mark.parametrize("key", GIVEN)
def test_a_key_that_is_given_in_vain_is_said(key, caplog):
    value, used_with = GIVEN[key]
    say(["logger.kind=csv", f"{key}={value}"])
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{key}") and f"has no effect: it is used with {used_with}" in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["tree.kind=custom", "tree.paths=[[0]]"],
        ["decode.rule=sampling", "decode.top_k=3", "decode.temperature=0.5"],
        ["train.kind=medusa2", "train.lora.rank=4"],
        ["train.loss=tv", "train.teacher=top_k", "train.top_k=3"],
        ["evaluate.server=http://x", "serving.patience=3", "evaluate.server_concurrency=[2]"],
        ["stages=[export]", "export.dtype=float16"],
        ["stages=[inspect]", "head.num_heads=2", "train.max_steps=3"],  # a later call may train
        ["stages=[train,evaluate]", "head.num_heads=2"],
        ["stages=[evaluate]", "train.kind=medusa2"],  # which decodes with an adapted backbone
        ["decode.top_k=null", "tree.paths=[]"],
        ["train.max_steps=3"],
    ],
)
def test_what_has_an_effect_is_not(overrides, caplog):
    say(overrides)
    assert caplog.records == []


@pytest.mark.parametrize("given", ["head.num_heads=2", "train.max_steps=3", "head={num_heads: 2}"])
def test_how_heads_are_trained_is_given_in_vain_where_none_are(given, caplog):
    say(["stages=[calibrate,report]", given])
    [said] = [record.getMessage() for record in caplog.records]
    assert "has no effect: it is for stage train, which stages=[calibrate,report] leaves" in said


def test_a_family_is_given_in_vain_too(caplog):
    compose(["stages=[calibrate]", "model.path=x", "head=medusa_tied"])
    assert caplog.text.count("head has no effect: it is for stage train") == 1


def test_the_choices_of_an_experiment_are_not_its_callers(caplog):
    compose(["+experiment=smoke"])
    assert caplog.records == []
    compose(["+experiment=smoke", "train.epochs=3"])
    assert "train.max_steps=null (it is 4)" in caplog.text


def test_every_row_names_keys_and_words_of_the_schema():
    for row in USES:
        for key in row.keys:
            section, name = place_of(key)
            assert name == "*" or name in {field.name for field in fields(section)}, key
        for key, words in row.of:
            section, name = place_of(key)
            [limit] = [f.metadata.get("limit") for f in fields(section) if f.name == name]
            if isinstance(limit, OneOf) and words != ("something",):
                assert {*words} <= {*limit.words}, key


def test_what_a_meaning_says_of_a_choice_is_in_the_table():
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", PAGE.read_text(), re.M)
    said = {key for key, meaning in rows if re.match(r"With \w+=", meaning)}
    refused = {"train.devices"}  # where it does not apply, by a check of its own
    assert said - refused
    for key in said - refused:
        assert any(_names(row, key) for row in USES), key


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["tree=custom", "stages=[calibrate]"], "tree=custom"),
        (["tree=custom", "tree.paths=[[0]]", "tree.path=x", "stages=[evaluate]"], "tree=custom"),
        (["tree=medusa_63", "head.num_heads=3", "stages=[train]"], "head.num_heads=3"),
        (["tree=custom", "tree.paths=[[0],[0,0]]", *ONE_HEAD], "head.num_heads=1"),
    ],
)
def test_trees_that_the_stages_cannot_use_are_refused_at_once(overrides, key):
    with pytest.raises(UserError, match=re.escape(key)):
        compose(overrides)
