"""Sessions of configs that name their own directories, and what their stages have left."""

import json
from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.data.examples import Examples, Table, open_examples
from medusa_exp.runs.metric_table import is_timed
from medusa_exp.stages import regenerate
from medusa_exp.stages.session import Session


def session_of(config: Config) -> Session:
    return Session(config, Path(config.run_dir))


def documents_of(config: Config, out: Path) -> list[dict]:
    """Return the documents that stage regenerate has written."""
    key = json.loads((out / regenerate.RECORD).read_text())["key"]
    path = Path(config.cache_dir) / "regenerated" / key / "documents"
    return rows_of(open_examples(path))


def rows_of(table: Table) -> list[dict]:
    """Return all that a table of examples holds."""
    names, sources = table.strings("conversation_id"), table.strings("source")
    return [
        {
            "input_ids": example.input_ids.tolist(),
            "is_trained": example.is_trained.tolist(),
            "conversation_id": name,
            "source": source,
        }
        for example, name, source in zip(Examples(table), names, sources, strict=True)
    ]


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that no clock decides."""
    return {name: value for name, value in metrics.items() if not is_timed(name)}
