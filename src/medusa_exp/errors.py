"""Exceptions: UserError, a wrong input or setting, and Stopped, a signal; how a program ends."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

_NO_READER = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code of a program whose output nobody reads any more, as shells have it."""


class UserError(ValueError):
    """Something a user can put right: says what is wrong, where, and what to do.

    The command line prints its message alone and exits with 1; from Python it is a ValueError.
    """


class Stopped(UserError):
    """A signal stopped the work, and what was done of it is kept: no fault of the job's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """Number of the signal."""


@contextmanager
def as_program() -> Iterator[None]:
    """Around what a small program does: a UserError is one line, and exit code 1.

    So that `| head` shows no traceback, a reader of the output that has gone ends it quietly.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        sys.exit(str(error))
    except BrokenPipeError:
        drop_output(sys.stdout)
        sys.exit(_NO_READER)


def end_without_reader(error: BrokenPipeError) -> NoReturn:
    """End the process quietly where it is its own output that nobody reads any more.

    Raises:
        BrokenPipeError: it is another pipe that broke, such as a server's.
    """
    try:
        # An empty line, since what could not be written need not be in the buffer still.
        print(flush=True)
    except BrokenPipeError:
        drop_output(sys.stdout)
        sys.exit(_NO_READER)
    raise error


def drop_output(stream: TextIO) -> None:
    """Have what is still printed go nowhere: its reader has gone, and each line would fail anew.

    So does what Python has buffered, and would write as it ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
