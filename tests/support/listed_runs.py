"""Run directories as small as can be, for what lists and cleans."""

import json
import os
import time
from pathlib import Path

RUN = {
    "name": "quick",
    "created": "2026-03-01T10:00:00+00:00",
    "cache_keys": {"dataset": "d1", "tokenised": "t1", "model": "m1"},
    "stages": {"train": {"status": "done", "features": {"train": "f1"}}},
}
METRICS = {"eval/tokens_per_step": 3.25, "eval/speedup": 2.5, "eval/identical_fraction": 1.0}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_run(path: Path, run: object = RUN, metrics: object = METRICS, stages="[train]") -> Path:
    write(path / "run.json", run)
    write(path / "metrics.json", metrics)
    write(path / "heads" / "config.json", {"kind": "medusa", "num_heads": 5})
    model = "model:\n  kind: pretrained\n  path: /data/private/llama\n"
    write(path / ".hydra" / "config.yaml", f"name: quick\nstages: {stages}\n{model}")
    return path


def make_old(path: Path) -> None:
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time.time() - 3 * 86400,) * 2)


def stages(**statuses: str) -> dict:
    entries = {name: {"status": status, "error": "E: x\ny"} for name, status in statuses.items()}
    return {**RUN, "stages": entries}
