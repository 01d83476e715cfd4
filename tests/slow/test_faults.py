"""Whatever goes wrong with a command, the same command ends the work as if nothing had been.

`nox -s faults`. A sample of the places where it may go wrong, FAULTS times as large as it is by
default (`FAULTS=0.2`: a fifth), or all of them (`FAULTS=all`, hours).
"""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from cli_runs import read
from faulty_commands import GXX, Commands, Ended, Fault
from whole_runs import AGAIN, NOT_ALWAYS, OTHERS, Case, cases, differences

from medusa_exp.cli import STAGES

pytestmark = pytest.mark.skipif(GXX is None, reason="there is no g++, or no Linux")

ALL = [*STAGES, *OTHERS, "sweep"]
READING = [*ALL, *(f"{name} again" for name in AGAIN)]
SIZE = os.environ.get("FAULTS", "1")
KILLS, SIGNALS, MOMENTS, FULL_DISKS, FLIPS, MALFORMATIONS = 16, 6, 6, 8, 16, 12
"""Of each command."""
LIMITS = (30_000, 100_000, 300_000)
"""Bytes that no file may pass: less than a model, heads or a checkpoint have."""
NUMBERS = re.compile(r"^\S*(metrics\.json|records\.jsonl|run/heads\S*|\.safetensors)\b")
"""Files in which, or in whose absence, a number is another one."""
MALFORMED = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]\n",
    "of no keys": lambda content: b"{}\n",
    "null": lambda content: b"null\n",
    "not UTF-8": lambda content: b'{"\xff": 1}\n',
    "too deep": lambda content: b"[" * 100_000,
}


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as found:
        yield found


@pytest.fixture(scope="session")
def whole(commands, tmp_path_factory) -> dict[str, Case]:
    return cases(commands, tmp_path_factory.mktemp("whole"))


def spread(things: list, number: int) -> list:
    """Return so many of some things, evenly."""
    number = len(things) if SIZE == "all" else min(max(1, round(number * float(SIZE))), len(things))
    return [things[(2 * i + 1) * len(things) // (2 * number)] for i in range(number)]


def place_of(case: Case, folder: Path) -> Path:
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(case.before, place)
    return place


def after_end(ended: Ended) -> list[str]:
    """Say what is wrong with a command that was to do its work."""
    found = [f"exit {ended.status}: {ended.stderr[-1500:]}"] if ended.status else []
    return found + traces(ended)


def after_refusal(ended: Ended, *words: str) -> list[str]:
    """Say what is wrong with a command that was to end with a message."""
    found = [] if ended.status == 1 else [f"exit {ended.status}: {ended.stderr[-1500:]}"]
    lacks = [word for word in words if word not in ended.stderr]
    found += [f"its message lacks {lacks}: {ended.stderr[-1500:]}"] if lacks else []
    return found + traces(ended)


def after_signal(ended: Ended, number: int) -> list[str]:
    """Say what is wrong with a command that a signal was to stop, if it had not ended before."""
    if ended.status in (0, 128 + number):
        return traces(ended)
    return [f"exit {ended.status} after signal {number}: {ended.stderr[-1500:]}", *traces(ended)]


def traces(ended: Ended) -> list[str]:
    text = ended.stdout + ended.stderr
    at = text.find("Traceback (most recent call last)")
    return [text[at:][:3000]] if at >= 0 else []


def goes_on(case: Case, commands: Commands, place: Path) -> list[str]:
    """Give the command once more; say in what it is not as if nothing had been."""
    return after_end(case.run(commands, place)) + differences(case, place)


def check(failures: list[str]) -> None:
    print("\n".join(failures))  # whole
    assert not failures


@pytest.mark.parametrize("name", ALL)
def test_killed_at_a_call_it_goes_on(name, commands, whole, tmp_path):
    """In the middle of a write, or before any other call that changes a file."""
    case, failures, killed = whole[name], [], 0
    for at in spread(range(1, case.num_changes + 1), KILLS):
        place = place_of(case, tmp_path)
        ended = case.run(commands, place, Fault("kill", at))
        killed += ended.status == -signal.SIGKILL
        for text in goes_on(case, commands, place):
            failures.append(f"killed at call {at}, {ended.calls}: {text}")
    check(failures)
    assert killed


@pytest.mark.parametrize("name", ALL)
def test_stopped_by_a_signal_it_goes_on(name, commands, whole, tmp_path):
    case, failures, stopped = whole[name], [], 0
    for i, at in enumerate(spread(range(1, case.num_changes + 1), SIGNALS)):
        place, number = place_of(case, tmp_path), (signal.SIGINT, signal.SIGTERM)[i % 2]
        ended = case.run(commands, place, Fault("signal", at, number))
        stopped += bool(ended.status)
        for text in after_signal(ended, number) + goes_on(case, commands, place):
            failures.append(f"{number.name} at call {at}, {ended.calls}: {text}")
    check(failures)
    assert stopped


@pytest.mark.parametrize("name", ALL)
def test_at_any_moment_it_may_be_killed_or_stopped(name, commands, whole, tmp_path):
    case, failures, rng = whole[name], [], random.Random(name)
    kinds = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    for i, part in enumerate(spread([j / 100 for j in range(100)], MOMENTS)):
        place, number = place_of(case, tmp_path), kinds[i % 3]
        running = case.start(commands, place)
        time.sleep(part * case.seconds)
        running.kill(number)
        if number == signal.SIGINT and rng.random() < 0.5:
            time.sleep(rng.random() * 0.1)
            running.kill(number)
        ended = running.wait()
        found = [] if number == signal.SIGKILL else after_signal(ended, number)
        for text in found + goes_on(case, commands, place):
            failures.append(f"{number.name} at {part}: {text}")
    check(failures)


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_is_one_message(name, commands, whole, tmp_path):
    case, failures = whole[name], []
    for at in spread(case.growing, FULL_DISKS):
        place = place_of(case, tmp_path)
        ended = case.run(commands, place, Fault("full", at))
        for text in after_refusal(ended, "full") + goes_on(case, commands, place):
            failures.append(f"full at call {at}, {ended.calls}: {text}")
    check(failures)


@pytest.mark.parametrize("name", ALL)
def test_files_that_may_not_grow_are_one_message(name, commands, whole, tmp_path):
    case, failures = whole[name], []
    for limit in LIMITS:
        place = place_of(case, tmp_path)
        ended = case.run(commands, place, Fault("limit", limit))
        found = after_refusal(ended) if ended.status else traces(ended)
        for text in found + goes_on(case, commands, place):
            failures.append(f"files of {limit} bytes: {text}")
    check(failures)


def found_or_harmless(case: Case, commands: Commands, place: Path, damaged: str) -> list[str]:
    """Say what is wrong where a file is damaged that a command reads.

    The command may refuse it, make it anew, or name it as damaged, empty or changed and go on
    without; or not mind, if every number is what it was.
    """
    ended = case.run(commands, place)
    if ended.status:
        return after_refusal(ended)
    if f"{damaged} " in ended.stdout + ended.stderr:
        return traces(ended)
    return traces(ended) + [text for text in differences(case, place) if NUMBERS.search(text)]


@pytest.mark.parametrize("name", READING)
def test_one_flipped_byte_is_found_or_changes_nothing(name, commands, whole, tmp_path):
    case, failures, rng = whole[name], [], random.Random(name)
    flips = [(file, part) for file in sorted(case.read) for part in range(2)]
    for file, part in spread(flips, FLIPS):
        place = place_of(case, tmp_path)
        content = bytearray((place / file).read_bytes())
        if not content:
            continue
        at = int((part + rng.random()) / 2 * len(content))
        content[at] ^= 1 << rng.randrange(8)
        (place / file).write_bytes(content)
        for text in found_or_harmless(case, commands, place, file):
            failures.append(f"{file}, byte {at}: {text}")
    check(failures)


@pytest.mark.parametrize("name", READING)
def test_a_malformed_file_is_found(name, commands, whole, tmp_path):
    case, failures = whole[name], []
    files = [file for file in sorted(case.read) if Path(file).suffix in (".json", ".jsonl")]
    for file, kind in spread([(file, kind) for file in files for kind in MALFORMED], MALFORMATIONS):
        place = place_of(case, tmp_path)
        (place / file).write_bytes(MALFORMED[kind]((place / file).read_bytes()))
        for text in found_or_harmless(case, commands, place, file):
            failures.append(f"{file}, {kind}: {text}")
    check(failures)


PAIRS = spread(list(combinations(STAGES, 2)), 12)


@pytest.mark.parametrize(
    "names", list(dict.fromkeys([("calibrate", "evaluate"), *PAIRS])), ids="+".join
)
def test_two_stages_at_once_lose_no_number(names, commands, whole, tmp_path):
    last = whole[[*STAGES][-1]]
    shutil.copytree(last.after, place := tmp_path / "place")
    both = [whole[name].start(commands, place) for name in names]
    for running in both:
        ended = running.wait()
        assert not (traces(ended) or ended.status not in (0, 1)), ended.stderr
    expected, found = ({*read(path / "run/metrics.json")} for path in (last.after, place))
    assert found ^ expected <= {NOT_ALWAYS}
