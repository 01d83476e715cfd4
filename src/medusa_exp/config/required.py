"""What a config must name before its stages can begin."""

from typing import Any

from medusa_exp.errors import UserError

NO_MODEL = "model.path is not set: name a Hugging Face model directory or hub name."
_OF_MODEL = {"regenerate", "train", "calibrate", "evaluate", "export", "chat"}
"""Stages that take a model, and make none."""


def check_model(config: Any) -> None:
    """Refuse a config whose stages take a model, and that names none.

    Not where others are among them: pretrain and demo have their own, and what is no stage is told
    elsewhere. Data can be looked at by a tokenizer alone, for which that stage asks.

    Args:
        config: as it was composed, or as it was checked.

    Raises:
        UserError: model.path is not set.
    """
    stages = {*config.stages} - {"report", "inspect"}
    takes_one = bool(stages) and stages <= _OF_MODEL and config.model.kind == "pretrained"
    if takes_one and config.model.path is None:
        raise UserError(NO_MODEL)
