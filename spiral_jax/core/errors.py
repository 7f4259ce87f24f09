"""What a user can mend."""


class UserError(Exception):
    """Ends a command with its message alone, without a stack trace.

    The message names the field, file or flag, its value, what is allowed and what to do. Each kind
    of it is a class beside the code that raises it. A `ValueError` is a caller's mistake instead:
    a bug of ours, which shows where it happened.
    """
