"""A small run, stage by stage: each with what was there before it and after it, and how to compare.

The stages are those of the command line's own table: one that is new is among them by that.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faulty_commands import NONE, Commands, Ended, Fault, Running

from medusa_exp.cli import STAGES
from medusa_exp.runs.files import read_json, read_jsonl
from medusa_exp.runs.metric_table import is_timed

NEW = (
    *("+experiment=smoke", "device=cpu", "dataset.num_conversations=60", "evaluate.baselines=[]"),
    *("regenerate.num_documents=16", "regenerate.num_val_documents=4"),
    *("regenerate.max_new_tokens=8", "train.text=regenerated", "tree.max_nodes=4"),
)
STDIN = {"chat": "What is 1 + 1?"}
OTHERS = {
    "train on a feature cache": ("train", ("train.features=cache",)),
    "train=medusa2": ("train", ("train=medusa2", "train.text=data")),
    "train with W&B": ("train", ("logger=wandb", "logger.mode=offline")),
    "export of the whole model": ("export", ("export.format=hf_generate",)),
}
"""What a stage does under other settings, besides what it does under those of `NEW`."""
AGAIN = ("pretrain", "regenerate", "train", "sweep")
"""What is done once more where it has been done: each finds what it has left."""
SWEEP = (
    *("-m", *NEW, "train.text=data", "stages=[pretrain,train]", "head.num_heads=1,2"),
    *("objective=val/accept_length", "sweep_dir=sweep"),
)
_UNLIKE = re.compile(
    r"(^|/)(wandb|\.hydra-\d+)/|^\.(cache|config|netrc|triton)|\.log$|uncommitted\.diff$"
    r"|^tmp/tmp\w+/data/\w+\.table\.json$"  # W&B's own, where it is killed as it logs a table
    r"|^tmp/tmp\w+/port-\d+\.txt$"  # and as its service begins
)
"""Files of which each call makes others, or as many as it likes."""
NOT_ALWAYS = "calibrate/break_even_batch_size"
"""Found only where the clock has it that there is one."""


@dataclass(frozen=True)
class Case:
    """A command and what it does to a place when nothing goes wrong."""

    name: str
    arguments: tuple[str, ...]
    stdin: str
    before: Path
    after: Path
    calls: list[str]
    """`KIND PATH` of each call that it makes to change a file, and `read PATH`."""
    seconds: float
    equal: frozenset[str]
    """Files that are the same to the last byte whenever it runs."""

    @property
    def num_changes(self) -> int:
        return sum(not call.startswith("read ") for call in self.calls)

    @property
    def growing(self) -> list[int]:
        """Which of its changes want room on the disk."""
        changes = [call for call in self.calls if not call.startswith("read ")]
        kinds = ("create ", "write ", "mkdir ", "allocate ")
        return [number for number, call in enumerate(changes, 1) if call.startswith(kinds)]

    @property
    def read(self) -> set[str]:
        """Files that were there before, and that it reads."""
        found = {call.partition(" ")[2] for call in self.calls if call.startswith("read ")}
        return {name for name in found if (self.before / name).is_file()}

    def start(self, commands: Commands, place: Path, fault: Fault = NONE) -> Running:
        return commands.start(*self.arguments, cwd=place, fault=fault, stdin=self.stdin)

    def run(self, commands: Commands, place: Path, fault: Fault = NONE) -> Ended:
        return self.start(commands, place, fault).wait()


def cases(commands: Commands, folder: Path) -> dict[str, Case]:
    """Run everything twice, and return it by name."""
    place = folder / "learning"
    place.mkdir()
    everything = f"stages=[{','.join(STAGES)}]"
    learned = commands.run(*NEW, everything, "run_dir=run", cwd=place, stdin=STDIN["chat"])
    assert learned.status == 0, learned.stderr
    commands.learn(learned.modules)
    found, place = {}, folder / "empty"
    (place / "tmp").mkdir(parents=True)
    found["sweep"] = _case(commands, folder, "sweep", SWEEP, place)
    for stage in STAGES:
        arguments = (*(() if (place / "run").exists() else NEW), f"stages=[{stage}]", "run_dir=run")
        for name, (other, more) in OTHERS.items():
            if other == stage:
                stdin = STDIN.get(stage, "")
                found[name] = _case(commands, folder, name, (*arguments, *more), place, stdin)
        found[stage] = _case(commands, folder, stage, arguments, place, STDIN.get(stage, ""))
        place = found[stage].after
    for name in AGAIN:
        done, again = found[name], f"{name} again"
        found[again] = _case(commands, folder, again, done.arguments, done.after, done.stdin)
    return found


def _case(
    commands: Commands,
    folder: Path,
    name: str,
    arguments: tuple[str, ...],
    before: Path,
    stdin: str = "",
) -> Case:
    ended, places = [], [folder / f"{name}, {which}" for which in ("first", "second")]
    for place, action in zip(places, ("look", "none"), strict=True):
        shutil.copytree(before, place)
        fault = Fault(action)
        ended.append(commands.run(*arguments, cwd=place, fault=fault, stdin=stdin))
        assert ended[-1].status == 0, f"{name}: {ended[-1].stderr}"
    first, second = map(_files, places)
    assert first.keys() == second.keys(), name
    equal = {key for key in first if first[key].read_bytes() == second[key].read_bytes()}
    # The clock's, equal by chance (a report has the minute); and cards, which name the commit.
    equal -= {"run/tree.json", "run/calibration.json"}
    equal = {key for key in equal if Path(key).name not in ("README.md", "report.html")}
    calls, seconds = ended[0].calls, ended[1].seconds
    return Case(name, arguments, stdin, before, places[1], calls, seconds, frozenset(equal))


def _files(place: Path) -> dict[str, Path]:
    found = {str(path.relative_to(place)): path for path in place.rglob("*") if not path.is_dir()}
    return {name: path for name, path in found.items() if not _UNLIKE.search(name)}


def differences(case: Case, place: Path) -> list[str]:
    """Say in what a place differs from the one where nothing went wrong."""
    expected, found = _files(case.after), _files(place)
    said = [f"{name} is missing" for name in expected.keys() - found.keys()]
    said += [f"{name} is left over" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        one, other = expected[name], found[name]
        if Path(name).name in _CONTENTS:
            said += _unlike(name, *(_CONTENTS[one.name](path) for path in (one, other)))
        elif name in case.equal and one.read_bytes() != other.read_bytes():
            said.append(f"{name} has other bytes")
    return said


def _unlike(name: str, one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    for key in sorted(one.keys() | other.keys()):
        is_history = name.startswith("sweep/") and name.endswith("history.jsonl")
        if is_history and key.startswith("pretrain/") and key not in one:
            continue  # this job has pretrained in place of another, which could not
        if one.get(key) != other.get(key):
            yield f"{name}: {key} is {other.get(key)!r}, not {one.get(key)!r}"


def _metrics(path: Path) -> dict[str, Any]:
    return {
        name: "timed" if is_timed(name) else value
        for name, value in json.loads(path.read_text()).items()
        if name != NOT_ALWAYS
    }


def _history(path: Path) -> dict[str, Any]:
    """Return `STAGE/STEP` -> its numbers; a line that was written again counts last."""
    found: dict[str, Any] = defaultdict(dict)
    for row in read_jsonl(path):
        key = f"{row.pop('stage')}/{row.pop('step')}"
        found[key] |= {name: row[name] for name in row if not is_timed(name)}
    return dict(found)


def _record(path: Path) -> dict[str, Any]:
    run = read_json(path)
    stages = {
        name: (entry["status"], [metric for metric in entry["metrics"] if metric != NOT_ALWAYS])
        for name, entry in run["stages"].items()
    }
    return {**stages, **{name: run[name] for name in ("name", "seed", "data", "cache_keys")}}


def _job(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return {name: value for name, value in found.items() if name not in ("attempts", "error")}


_CONTENTS = {
    "metrics.json": _metrics,
    "history.jsonl": _history,
    "run.json": _record,
    "job.json": _job,
}
"""Files that have a time in them, or each line as often as it was come to: what else they say."""
