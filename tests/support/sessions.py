"""Sessions of configs that name their own directories."""

from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.stages.session import Session


def session_of(config: Config) -> Session:
    return Session(config, Path(config.run_dir))
