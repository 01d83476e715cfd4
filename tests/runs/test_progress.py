"""The progress of long work, on a terminal and off it."""

import io
import logging
import time

import pytest
from rich.console import Console

from medusa_exp.runs import progress


@pytest.mark.parametrize(
    ("speed", "said"), [(None, ""), (0.02, "50.0 s each"), (2.5, "2.5/s"), (1234.0, "1234/s")]
)
def test_slow_things_have_a_rate_too(speed, said):
    assert progress.rate(speed) == said


def test_off_a_terminal_a_line_now_and_then_says_how_far_it_is(monkeypatch, caplog, capsys):
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)
    with progress.ProgressBar("regenerating answers", total=2000, completed=100) as bar:
        bar.advance(200, tokens=5000)
    assert caplog.messages[0].startswith("regenerating answers: 300 of 2,000")
    shown = capsys.readouterr().err
    assert " tokens/s" in caplog.messages[0] and " tokens/s" in shown
    assert "300/2000" in shown and "\x1b" not in shown and "\r" not in shown


def test_on_a_terminal_the_bar_is_enough(monkeypatch, caplog):
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    assert list(progress.track("ab", "training")) == ["a", "b"]
    assert "2/2" in terminal.file.getvalue() and not caplog.messages


def test_what_else_there_is_to_say_is_on_the_bar_and_in_the_line(monkeypatch, caplog):
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=160)
        monkeypatch.setattr(progress, "Console", lambda console=console, **_: console)
        with progress.ProgressBar("training", 2) as bar:
            bar.advance(more=lambda: "57% of the matrix rate")
        assert "57% of the matrix rate" in console.file.getvalue()
    assert [line.endswith(", 57% of the matrix rate") for line in caplog.messages] == [True]


def test_a_reader_that_gives_nothing_says_where_it_is(monkeypatch, caplog):
    """Time of whoever takes what it gives does not count."""
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.1)
    monkeypatch.setattr(progress, "BETWEEN_LOOKS", 0.02)
    caplog.set_level("INFO")

    def slowly():
        yield 1
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.02)
        yield 2

    with progress.Patience(lambda: "at the second") as patience:
        taken = patience.each(slowly())
        assert next(taken) == 1
        time.sleep(0.3)
        assert not caplog.messages
        assert list(taken) == [2]
    assert caplog.messages[0] == "at the second"
