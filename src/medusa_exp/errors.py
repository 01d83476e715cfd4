"""Exceptions: UserError, a wrong input or setting, and Stopped, a signal; how a program ends."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
        # Python writes what is left as it ends, and would tell of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
