"""The exceptions that people are meant to read."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, and how to mend it."""

    code = 1  # of the process


class PassingError(UserError):
    """What may be over soon: another rank is gone, a file server is away. Trying again may go well,
    which it does not with the other errors of this kind."""

    code = 70


class PeerLost(PassingError):
    """Another rank is gone. It has said why, or was killed; its launcher knows which."""
