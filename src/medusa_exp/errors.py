"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something a user can put right: says what is wrong, where, and what to do.

    The command line prints its message alone and exits with 1; from Python it is a ValueError.
    """
