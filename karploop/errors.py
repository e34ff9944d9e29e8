"""The two ways in which a run may end early without a traceback."""


class UserError(Exception):
    """A user's mistake: the message says what was wrong, where, and what to do.

    Entry points print the message alone on stderr and exit with code 2; no traceback.
    """


class RunFailed(Exception):
    """A run cannot go on, through no fault in the code: the message says what happened and when.

    Entry points print the message alone on stderr and exit with code 1.
    """
