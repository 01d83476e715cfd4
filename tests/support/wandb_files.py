"""What W&B's own reader, `wandb leet inspect`, finds in the offline file of a run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def run_files(out: Path) -> list[Path]:
    """Return the .wandb files of a run directory, the oldest first."""
    return sorted((out / "wandb").glob("*run-*/run-*.wandb"))


def records(file: Path) -> list[Record]:
    """Return the records of a .wandb file: {"type": TYPE, TYPE: {...}}."""
    return [json.loads(line) for line in _inspect("--json", str(file)).splitlines()]


def state(file: Path) -> Record:
    """Return the run as it is at the end of the file: summary, config, exit_code, ..."""
    return json.loads(_inspect("--summary", "--json", str(file)))


def of_type(found: list[Record], kind: str) -> list[Record]:
    """Return what the records of one type hold."""
    return [record[kind] for record in found if record["type"] == kind]


def table(file: Path, name: str) -> list[Record]:
    """Return the rows of a table in the summary."""
    logged = state(file)["summary"][name]
    assert logged["_type"] == "table-file"
    content = json.loads((file.parent / "files" / logged["path"]).read_text())
    assert (logged["nrows"], logged["ncols"]) == (len(content["data"]), len(content["columns"]))
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def _inspect(*arguments: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
