"""A progress bar on a terminal; a logged line each half minute elsewhere, where rich shows none."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

log = logging.getLogger(__name__)

_BAR_WIDTH = 16
"""Of 80 columns: the rest is for words and numbers."""
BETWEEN_LINES, BETWEEN_LOOKS = 30.0, 1.0
"""Seconds."""
_RATE_OVER = 180.0
"""Seconds of which a rate is the mean: responses of a batch may end together, once a minute."""
T = TypeVar("T")


class ProgressBar:
    """How far long work is, how fast, and how long still: `with ProgressBar(...) as bar`."""

    def __init__(self, what: str, total: int | None, completed: int = 0) -> None:
        remaining = TimeRemainingColumn(elapsed_when_finished=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(_BAR_WIDTH),
            MofNCompleteColumn(),
            _Rate(),
        )
        more = (TextColumn("{task.fields[tokens]}"), remaining, _Rest())
        # On stderr: what is redirected should hold results.
        console = Console(stderr=True)
        self._rich = Progress(*columns, *more, console=console, speed_estimate_period=_RATE_OVER)
        begin = partial(self._rich.add_task, what, total=total, completed=completed)
        self._task = begin(tokens="", more="")
        self._start = self._last_line = time.monotonic()
        self._tokens = 0

    def __enter__(self) -> "ProgressBar":
        self._rich.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._rich.stop()

    def advance(self, number: float = 1, tokens: int = 0, more: Callable[[], str] = str) -> None:
        """Count so many more as done, and the tokens that they gave, if it is tokens they give.

        `more` says what else bar and line are to have.
        """
        self._rich.update(self._task, advance=number, more=more())
        now = time.monotonic()
        self._tokens += tokens
        if tokens:
            speed = self._tokens / max(now - self._start, 1e-3)
            self._rich.update(self._task, tokens=f"{speed:,.0f} tokens/s")
        if not self._rich.console.is_terminal and now - self._last_line >= BETWEEN_LINES:
            self._last_line = now
            log.info("%s", describe(self._rich.tasks[0]))


def track(things: Sequence[T], what: str) -> Iterator[T]:
    """Yield things, with a bar."""
    with ProgressBar(what, len(things)) as bar:
        for thing in things:
            yield thing
            bar.advance()


def describe(task: Task) -> str:
    """Return how far a task is: `training: 300 of 2,000, 14/s, 0:02:05 left`."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    done = f"{task.description}: {task.completed:,.0f}{total}"
    left = task.time_remaining
    time_left = "" if left is None else f"{timedelta(seconds=int(left))} left"
    speed = rate(task.finished_speed or task.speed)
    tokens, more = (task.fields.get(name) for name in ("tokens", "more"))
    return ", ".join(filter(None, (done, speed, tokens, time_left, more)))


def rate(speed: float | None) -> str:
    """Return so many things a second; of slow ones, the seconds of each."""
    if not speed:
        return ""
    if speed < 1:
        return f"{1 / speed:.1f} s each"
    return f"{speed:.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


class _Rest(ProgressColumn):
    """What else is to be said, as far as the terminal has room beside all the others."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["more"], no_wrap=True, overflow="ellipsis")


class _Rate(ProgressColumn):
    """Things a second; rich's own column shows this only where the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.finished_speed or task.speed))


class Patience:
    """Says in a line each half minute what a reader is at, while it gives nothing."""

    def __init__(self, place: Callable[[], str]) -> None:
        self._place = place
        self._since: float | None = None
        self._done = threading.Event()

    def __enter__(self) -> "Patience":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; time that whoever takes them needs does not count."""
        waiting = iter(items)
        while True:
            self._since = time.monotonic()
            try:
                item = next(waiting)
            except StopIteration:
                return
            finally:
                self._since = None
            yield item

    def _watch(self) -> None:
        said = 0.0
        while not self._done.wait(BETWEEN_LOOKS):
            since, now = self._since, time.monotonic()
            if since is not None and now > max(since, said) + BETWEEN_LINES:
                said = now
                log.info("%s", self._place())
