"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A user's mistake: the message says what was wrong, where, and what to do.

    Entry points print the message alone on stderr and exit with code 2; no traceback.
    """
