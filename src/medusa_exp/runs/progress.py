"""The progress of long work, how far, how fast, how long still: a bar, or lines of a log.

Where nobody watches a terminal (a pipe, CI), a line now and then says it: silence looks like death.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

log = logging.getLogger(__name__)

BETWEEN_LINES = 30.0
"""Seconds."""

T = TypeVar("T")


class _Progress(Progress):
    """Rich's progress; off a terminal, where that draws nothing before the end, it logs lines."""

    _last_line = 0.0

    def start(self) -> None:
        self._last_line = time.monotonic()
        super().start()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= BETWEEN_LINES:
            self._last_line = now
            log.info("%s", describe(self._tasks[task_id]))


def progress_bar() -> Progress:
    """Return rich's context of a bar, to be given a task: `add_task(description, total=...)`."""
    # On stderr: what is redirected should hold results.
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


def track(things: Sequence[T], description: str) -> Iterator[T]:
    """Yield things, with a bar."""
    with progress_bar() as bar:
        yield from bar.track(things, description=description)


def describe(task: Task) -> str:
    """Return how far a task is: `training: 300 of 2,000, 14/s, 0:02:05 left`."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    left = task.time_remaining
    words = [
        f"{task.description}: {task.completed:,.0f}{total}",
        rate(task.finished_speed or task.speed),
        "" if left is None else f"{timedelta(seconds=int(left))} left",
    ]
    return ", ".join(filter(None, words))


def rate(speed: float | None) -> str:
    """Return so many things a second; of slow ones, the seconds of each."""
    if not speed:
        return ""
    if speed < 1:
        return f"{1 / speed:.1f} s each"
    return f"{speed:.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


class _Rate(ProgressColumn):
    """Things a second; rich's own column shows this only where the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.finished_speed or task.speed))
