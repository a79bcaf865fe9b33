class UserError(Exception):
    """Something that the user can mend: the message says what, where and how."""

    code = 1  # of the process


class PeerLost(UserError):
    """Another rank is gone. Trying again may go well, as it may not with other errors of this kind."""

    code = 70
