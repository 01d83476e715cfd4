"""The command line in a process of its own, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

SMOKE = ["+experiment=smoke", "evaluate.baselines=[]", "device=cpu"]


def medusa_exp(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "medusa_exp", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def read(path: Path):
    return json.loads(path.read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_logs(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(".log")}


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)
