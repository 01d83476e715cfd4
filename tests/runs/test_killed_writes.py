"""What is written by `publish` is old or new, and whole, whenever its process is killed.

Of whole commands, see tests/slow/test_faults.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from faulty_commands import GXX, build_library

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++, or no Linux")
SCRIPT = """
import ctypes, os, sys
from pathlib import Path
from medusa_exp.runs.files import publish, read_json, write_json

place, number = Path(sys.argv[1]), 0

def write(value):
    write_json(place / "file.json", [value] * 1000)
    with publish(place / "folder") as partial:
        partial.mkdir()
        for name in "ab":
            (partial / name).write_text(str(value))

def value_of_folder():
    found = {path.name: path.read_text() for path in (place / "folder").glob("*")}
    assert not found or (set(found) == {"a", "b"} and len(set(found.values())) == 1), found
    return found.get("a")

while True:
    if not (child := os.fork()):  # each process looks for leftovers once
        write(-1)
        assert {path.name for path in place.iterdir()} == {"file.json", "folder"}, number
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, number
    number += 1
    if not (child := os.fork()):
        ctypes.CDLL(None).faults_arm(str(place).encode(), 2, ctypes.c_long(number), 0, -1)
        write(number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    value, = set(read_json(place / "file.json"))
    assert value in (number, -1), (number, value)
    value_of_folder()
    if os.WIFEXITED(status):
        break
print(number - 1)
"""


def test_whatever_call_it_is_killed_at(tmp_path):
    library = build_library(tmp_path)
    (place := tmp_path / "place").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, place],
        env={"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15, "calls that it made"
