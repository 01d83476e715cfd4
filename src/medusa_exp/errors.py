"""Errors that are the user's to mend, or the user's wish."""


class UserError(ValueError):
    """Something a user can put right: says what is wrong, where, and what to do.

    The command line prints its message alone and exits with 1; from Python it is a ValueError.
    """


class Stopped(UserError):
    """A signal stopped the work, and what was done of it is kept: no fault of the job's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """Of the signal."""
