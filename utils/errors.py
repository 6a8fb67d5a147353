"""The one kind of error that a user can mend."""


class UserError(Exception):
    """Something outside the code is wrong. The message is one line: what, where, and what to do."""


class BrokenDataError(UserError):
    """An image cannot be read, which only the rank that reads it meets."""


def reason(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def listing(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
