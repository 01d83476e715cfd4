"""Sessions of configs that name their own directories, and what their stages have left."""

import json
from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.data.examples import open_examples
from medusa_exp.runs.metric_table import is_timed
from medusa_exp.stages import regenerate
from medusa_exp.stages.session import Session


def session_of(config: Config) -> Session:
    return Session(config, Path(config.run_dir))


def documents_of(config: Config, out: Path) -> list[dict]:
    """Return the documents that stage regenerate has written."""
    key = json.loads((out / regenerate.RECORD).read_text())["key"]
    path = Path(config.cache_dir) / "regenerated" / key / "documents.arrow"
    return open_examples(path).to_pylist()


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that no clock decides."""
    return {name: value for name, value in metrics.items() if not is_timed(name)}
