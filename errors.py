"""The one error that a user can mend: each script prints its text in one line and exits with 2."""


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""
