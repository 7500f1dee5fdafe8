"""The exception for mistakes that a user can mend, and text from files made safe for messages."""


class InputError(ValueError):
    """The user gave something wrong; the message is one line that names the culprit and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank; without one, the exception's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(text: object, limit: int = 200) -> str:
    """Text from a checkpoint, made safe to print: on one line, without control characters, cut where it is long."""
    text = str(text)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text)} characters)"
