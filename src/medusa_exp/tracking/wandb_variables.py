"""W&B's own environment variables, where the config leaves its default.

    WANDB_MODE, WANDB_DISABLED    logger.mode
    WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_TAGS, WANDB_NOTES
                                  the keys of `logger` of these names
    WANDB_NAME                    the name of the run, else NAME/RUN_DIR

A word of the command line, or of an experiment's YAML, wins.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from medusa_exp.config import LoggerConfig
from medusa_exp.config.command_line import key_of
from medusa_exp.config.ignored import keys_of
from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_KEYS = {
    "WANDB_MODE": "mode",
    "WANDB_DISABLED": "mode",
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_JOB_TYPE": "job_type",
    "WANDB_TAGS": "tags",
    "WANDB_NOTES": "notes",
}
"""Variable -> key of `logger`; of two for one key, the later."""
_MODES = {"dryrun": "offline", "run": "online"}
"""W&B's older words."""


def with_variables(logger: LoggerConfig, said: Sequence[str] = ()) -> LoggerConfig:
    """Return the section `logger` with W&B's variables in place of defaults.

    Args:
        logger: the section as it was composed.
        said: the overrides of the command line, as `logger.mode=offline`; such a key stays.

    Raises:
        UserError: naming the variable whose value cannot be.
    """
    if logger.kind != "wandb":
        return logger
    defaults, kept = LoggerConfig(), {*keys_of(said), *map(key_of, said)}
    for name, key in _KEYS.items():
        value = _value(name, os.environ.get(name, "").strip())
        if not value or f"logger.{key}" in kept or getattr(logger, key) != getattr(defaults, key):
            continue
        try:
            logger, defaults = replace(logger, **{key: value}), replace(defaults, **{key: value})
        except UserError as error:
            raise UserError(f"{name} of the environment: {error}") from error
        log.info("logger.%s=%s, by %s of the environment", key, value, name)
    return logger


def _value(name: str, text: str) -> Any:
    if name == "WANDB_TAGS":
        return [tag.strip() for tag in text.split(",") if tag.strip()]
    if name == "WANDB_DISABLED":
        return "disabled" if text.lower() in ("true", "1", "yes", "on") else ""
    return _MODES.get(text, text) if name == "WANDB_MODE" else text
