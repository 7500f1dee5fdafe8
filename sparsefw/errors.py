"""The one exception for what a user can mend, and how to quote another one in its line."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names the culprit and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank, or else the exception's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
