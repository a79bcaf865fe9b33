"""The one exception that people are meant to read."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, and how to mend it."""
