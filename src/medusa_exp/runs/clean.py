"""What the cache holds, what it is for, and what of it can go.

    python -m medusa_exp.runs.clean [outputs]                 shows it, and removes nothing
    python -m medusa_exp.runs.clean --unused --older 30       shows what would be removed
    python -m medusa_exp.runs.clean --kind features --yes     removes it

An entry that a run needs is never removed: of a run that is not done, all that it has noted; of one
that is, what its later stages cannot make again by themselves.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from medusa_exp.errors import UserError, as_program
from medusa_exp.runs.cache import lock_of
from medusa_exp.runs.files import remove
from medusa_exp.runs.list import Run, read_runs, size_and_newest, wide_console
from medusa_exp.runs.locks import locked
from medusa_exp.runs.schemas import is_seal, seal_beside
from medusa_exp.runs.seals import is_of_system

KINDS = {
    "synthetic": "generated chats",
    "tokenised": "data sets as token ids",
    "regenerated": "responses of backbones to a data set",
    "pretrained": "tiny models of stage pretrain",
    "features": "hidden states to train on",
    "continuations": "responses and states to validate on",
    "backbones": "fingerprints of models",
    "packed": "linear layers that are faster packed",
}
"""Directory of the cache -> what its entries are."""
_KEPT_FOR_DONE = ("regenerated", "pretrained")
"""Kinds without which a run that is done cannot go on: another stage makes them, or took hours."""
_NOT_NOTED = ("continuations", "backbones", "packed")
"""Kinds of which runs do not note which they use."""
_DAY = 86400.0
NEEDED, SPARE, UNUSED, LEFTOVER = "needed", "made again if wanted", "unused", "leftover"


@dataclass
class Entry:
    """Something in the cache."""

    kind: str
    path: Path
    bytes: int
    age_days: float
    """Since anything in it was last written."""
    runs: list[str] = field(default_factory=list)
    """Those that have noted it."""
    use: str = UNUSED

    @property
    def name(self) -> str:
        """The key by which runs note it, of responses that were begun too."""
        return self.path.name.removeprefix(".").removesuffix(".answers.jsonl")


def read_cache(cache: Path, runs: Sequence[Run]) -> list[Entry]:
    """Return what a cache holds, the largest first, and which of these runs need it.

    Raises:
        UserError: there is no such cache.
    """
    if not cache.is_dir():
        raise UserError(f"{cache} is no directory: name the cache by --cache, as cache_dir has it.")
    users = _users(runs)
    is_all_done = all(run.status == "done" for run in runs)
    entries = []
    for kind in KINDS:
        for path in sorted((cache / kind).glob("*")) + sorted((cache / kind).glob(".*")):
            # To remove a lock is to let two processes in; a seal is of the file beside it.
            is_no_entry = path.suffix in (".lock", ".held") or is_of_system(path)
            if is_no_entry or is_seal(path.name):
                continue
            size, newest = size_and_newest(path)
            age = (time.time() - newest.timestamp()) / _DAY
            entry = Entry(kind, path, size, age)
            found = users[kind, entry.name]
            entry.runs = [run.path for run in found]
            entry.use = _use(entry, found, is_all_done)
            entries.append(entry)
    return sorted(entries, key=lambda entry: -entry.bytes)


def _users(runs: Iterable[Run]) -> defaultdict[tuple[str, str], list[Run]]:
    users: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        for kind, names in run.cache_keys.items():
            for name in dict.fromkeys(names):
                users[kind, name].append(run)
    return users


def _use(entry: Entry, users: list[Run], is_all_done: bool) -> str:
    if ".partial-" in entry.path.name:
        return NEEDED if entry.age_days < 1 else LEFTOVER  # somebody may be writing it
    if entry.kind in _NOT_NOTED:
        return SPARE if is_all_done else NEEDED
    if not users:
        return UNUSED
    if entry.kind in _KEPT_FOR_DONE or any(run.status != "done" for run in users):
        return NEEDED
    return SPARE


def chosen(entries: list[Entry], options: argparse.Namespace) -> list[Entry]:
    """Return what the options ask to remove, without what is needed."""
    if not (options.unused or options.kind):
        return []
    wanted = (UNUSED, LEFTOVER) if options.unused else (UNUSED, LEFTOVER, SPARE)
    return [
        entry
        for entry in entries
        if entry.use in wanted
        and (not options.kind or entry.kind in options.kind)
        and entry.age_days >= options.older
    ]


def delete(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Remove entries, but for those that a process makes or has just made; yield the removed.

    One vanishes under its name at once: nobody finds half of it.
    """
    for entry in entries:
        path = entry.path
        if entry.use == LEFTOVER:
            remove(path)
            yield entry
            continue
        try:
            with locked(lock_of(path.with_name(entry.name)), timeout=0):
                going = path.with_name(f".{path.name}.partial-removed")
                path.rename(going)
                remove(going)
                remove(path.with_name(seal_beside(path.name)))
                yield entry
        except (Timeout, FileNotFoundError):  # in use, or gone already
            continue


def check_readable(runs: Iterable[Run]) -> None:
    """Raise a UserError where a run does not say what it needs."""
    for run in runs:
        if run.status == "malformed":
            raise UserError(
                f"{run.path} cannot be read ({run.reason}), so nobody knows what of the cache it "
                "needs: restore it, or delete that directory. Nothing was removed."
            )


def print_cache(entries: list[Entry], console: Console) -> None:
    """Print what a cache holds: a row a kind and use."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kind", "what it is", "use"):
        table.add_column(name)
    for name in ("entries", "size", "written, days ago", "of runs"):
        table.add_column(name, justify="right")
    groups: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.kind, entry.use].append(entry)
    for (kind, use), some in sorted(groups.items()):
        ages = sorted(entry.age_days for entry in some)
        table.add_row(
            *(kind, KINDS[kind], use, str(len(some)), decimal(sum(e.bytes for e in some))),
            f"{ages[0]:.0f} to {ages[-1]:.0f}",
            str(len({run for entry in some for run in entry.runs})),
        )
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medusa_exp.runs.clean",
        description="Show what the cache holds, and remove what no run needs.",
    )
    parser.add_argument("root", nargs="?", default="outputs", type=Path, help="where runs are")
    parser.add_argument("--cache", type=Path, help="the runs' cache_dir; by default ROOT/cache")
    more = "another place where runs of this cache are; may be given several times"
    parser.add_argument("--runs", type=Path, action="append", default=[], help=more)
    parser.add_argument("--unused", action="store_true", help="choose what no run has noted")
    kind = "choose all of a kind that no run needs, though it would be made again"
    parser.add_argument("--kind", choices=list(KINDS), action="append", help=kind)
    older = "of what is chosen, only what was written so many days ago"
    parser.add_argument("--older", type=float, default=0.0, metavar="DAYS", help=older)
    parser.add_argument("--yes", action="store_true", help="remove it; else it is only shown")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run as a program."""
    options = _parser().parse_args(arguments)
    console = wide_console()
    with as_program():
        runs = [run for root in (options.root, *options.runs) for run in read_runs(root)]
        entries = read_cache(options.cache or options.root / "cache", runs)
        print_cache(entries, console)
        going = chosen(entries, options)
        if options.yes:
            check_readable(runs)
            going = list(delete(going))
        for entry in going:
            console.print(
                f"{'removed' if options.yes else 'would be removed'}: {entry.path} "
                f"({decimal(entry.bytes)}, {entry.age_days:.0f} days, {entry.use})",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        total = decimal(sum(entry.bytes for entry in going))
        console.print(f"{len(runs)} runs looked at. {_outcome(options, len(going), total)}")


def _outcome(options: argparse.Namespace, number: int, total: str) -> str:
    if options.yes:
        return f"{number} entries removed, {total}."
    if options.unused or options.kind:
        return f"{number} entries, {total}: add --yes to remove them."
    return "Nothing is removed unless it is asked for: --unused, --kind KIND, --older DAYS; --yes."


if __name__ == "__main__":
    main(sys.argv[1:])
