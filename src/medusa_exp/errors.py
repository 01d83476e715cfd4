"""Exceptions: UserError, a wrong input or setting, and Stopped, a signal."""


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
