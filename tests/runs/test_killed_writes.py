"""What is written by `publish` is old or new, and whole, whenever its process is killed.

A directory is so too where names cannot be exchanged, once a next process has written there.

Of whole commands, see tests/slow/test_faults.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from faulty_commands import GXX, build_library

from medusa_exp.runs import files

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++, or no Linux")
SCRIPT = """
import ctypes, os, sys
from pathlib import Path
from medusa_exp.runs import files
from medusa_exp.runs.files import publish, read_json, write_json

place, number, can_exchange = Path(sys.argv[1]), 0, sys.argv[2] == "True"
if not can_exchange:
    files._exchange = lambda one, other: False

def write(value):
    write_json(place / "file.json", [value] * 1000)
    with publish(place / "folder") as partial:
        partial.mkdir()
        for name in "ab":
            (partial / name).write_text(str(value))

def check_folder(*values):
    found = {path.name: path.read_text() for path in (place / "folder").glob("*")}
    assert set(found) == {"a", "b"} and len(set(found.values())) == 1, (number, found)
    assert int(found["a"]) in values, (number, found)

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
    if not can_exchange and not (child := os.fork()):
        write_json(place / "other.json", 1)
        (place / "other.json").unlink()
        os._exit(0)
    if not can_exchange:
        assert os.waitpid(child, 0)[1] == 0
    check_folder(number, -1)
    if os.WIFEXITED(status):
        break
print(number - 1)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build_library(tmp_path_factory.mktemp("library"))


@pytest.mark.parametrize("can_exchange", [True, False])
def test_whatever_call_it_is_killed_at(library, tmp_path, can_exchange):
    (place := tmp_path / "place").mkdir()
    (other := tmp_path / "other").mkdir()
    if can_exchange and not files._exchange(place, other):
        pytest.skip("this file system exchanges no names")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, place, str(can_exchange)],
        env={"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15, "calls that it made"
