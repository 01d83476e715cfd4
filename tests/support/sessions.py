"""Sessions of configs that name their own directories; metrics that no clock decides."""

from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.runs.metric_table import is_timed
from medusa_exp.stages.session import Session


def session_of(config: Config) -> Session:
    return Session(config, Path(config.run_dir))


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not is_timed(name)}
