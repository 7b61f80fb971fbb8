"""The one error type that a user is meant to read."""


class RadioError(ValueError):
    """Something the user can mend: says what, where, what was expected and the way out.

    The command line prints it without a traceback and exits with 2.
    """
