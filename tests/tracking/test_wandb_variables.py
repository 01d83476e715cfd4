"""W&B's own variables stand in for defaults, and lose to what is said."""

import pytest

from medusa_exp import compose
from medusa_exp.cli import _as_composed
from medusa_exp.config import LoggerConfig
from medusa_exp.errors import UserError
from medusa_exp.tracking.wandb_variables import with_variables


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name, value in {
        "WANDB_MODE": "dryrun",
        "WANDB_PROJECT": "speed",
        "WANDB_ENTITY": "team",
        "WANDB_RUN_GROUP": "july",
        "WANDB_JOB_TYPE": "nightly",
        "WANDB_TAGS": "a, b,",
        "WANDB_NOTES": "why",
    }.items():
        monkeypatch.setenv(name, value)


def test_they_stand_in_for_defaults(caplog):
    with caplog.at_level("INFO"):
        found = with_variables(LoggerConfig())
    assert (found.mode, found.project, found.entity) == ("offline", "speed", "team")
    assert (found.group, found.job_type, found.notes) == ("july", "nightly", "why")
    assert found.tags == ["a", "b"]
    assert "logger.project=speed, by WANDB_PROJECT of the environment" in caplog.text


def test_what_is_said_wins():
    found = with_variables(LoggerConfig(entity="mine"), ["logger.project=medusa_exp", "seed=1"])
    assert (found.project, found.entity, found.notes) == ("medusa_exp", "mine", "why")


def test_what_is_said_of_a_section_wins(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    found = with_variables(LoggerConfig(), ["logger={mode: offline}"])
    assert (found.mode, found.project) == ("offline", "speed")
    assert with_variables(LoggerConfig(), ["~logger.tags"]).tags == []


@pytest.mark.parametrize(("word", "mode"), [("online", "online"), ("disabled", "disabled")])
def test_modes(monkeypatch, word, mode):
    monkeypatch.setenv("WANDB_MODE", word)
    assert with_variables(LoggerConfig()).mode == mode


def test_disabled_is_above_the_mode(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert with_variables(LoggerConfig()).mode == "disabled"


def test_a_mode_that_is_none(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match=r"WANDB_MODE of the environment: logger\.mode=shared"):
        with_variables(LoggerConfig())


def test_a_config_composed_in_python_heeds_what_is_said(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    found = compose(["logger=wandb", "logger.mode=offline"]).logger
    assert (found.mode, found.project) == ("offline", "speed")


def test_other_loggers_ask_for_none():
    assert with_variables(LoggerConfig(kind="csv")) == LoggerConfig(kind="csv")


def test_what_a_neighbor_refers_to_is_not_saved(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "speed")
    monkeypatch.setenv("PRIVATE", "hidden")
    config = compose(["logger=wandb", "logger.notes=${oc.env:PRIVATE}"])
    saved = _as_composed(config)["logger"]
    assert (saved["project"], saved["notes"]) == ("speed", "${oc.env:PRIVATE}")
