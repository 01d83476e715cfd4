"""The progress bar of long work: how far, how fast, how long still."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

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

T = TypeVar("T")


def progress_bar() -> Progress:
    """Return rich's context of a bar, to be given a task: `add_task(description, total=...)`."""
    # On stderr: what is redirected should hold results.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def track(things: Sequence[T], description: str) -> Iterator[T]:
    """Yield things, with a bar."""
    with progress_bar() as bar:
        yield from bar.track(things, description=description)


class _Rate(ProgressColumn):
    """Things a second; rich's own column shows this only where the total is unknown."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f}/s" if speed else "")
