"""Define the exception for wrong inputs, and write parts of messages: options, counts, lines."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Flags whose names differ from the names of their fields.
SHORT = {"evaluate": "--eval", "texts": "--eval", "folder": "--output"}

# "call" or "command": messages name options as in Python or, inside of `by_command`, as on the command line.
_invocation = "call"

# Errors of CUDA, its libraries and Triton's launcher have no exception classes. Their messages have one of these words.
GPU_WORDS = (
    "CUDA error",
    "CUDA unknown error",
    "CUDA driver",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "Triton Error [",
    "C compiler",
    "active drivers",
)

# Most columns in a line of a run's log.
WIDTH = 100

# Prints or logs a line.
Say = Callable[[str], None]


class InputError(ValueError):
    """An input is wrong. The message is one line that names the wrong input and the remedy.

    Names in the message may come from files. So unprintable characters are escaped: no message breaks its line or
    controls a terminal.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


@contextmanager
def by_command() -> Iterator[None]:
    """Name options as on the command line inside the `with` block."""
    global _invocation
    before, _invocation = _invocation, "command"
    try:
        yield
    finally:
        _invocation = before


def invocation() -> str:
    """Return how the user has started the run: "call" (from Python) or "command"."""
    return _invocation


def flag_of(name: str) -> str:
    """Return the flag of a field or of an argument."""
    return SHORT.get(name) or f"--{name.replace('_', '-')}"


def option(name: str, value: object = None) -> str:
    """Write an option as the user does: `reconstruct=0` in Python, `--reconstruct 0` on the command line.

    Args:
        name: name of the field or of the argument.
        value: the option's value; None: the name alone.
    """
    if _invocation == "command":
        return flag_of(name) if value is None or value is True else f"{flag_of(name)} {shown(value)}"
    return name if value is None else f"{name}={shown(repr(value))}"


def worded(flag: str) -> str:
    """Write a flag as the user does, see `option`. Text that does not begin with -- is returned unchanged."""
    return option(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else flag


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty.

    If the first line ends with a colon, the second line is added.
    """
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *others[:1]]) if first.endswith(":") else first


def is_gpu_failure(error: BaseException) -> bool:
    """Tell whether Triton or CUDA has failed to compile, launch or finish a kernel."""
    kind = type(error)
    named = kind.__module__.startswith("triton.") or kind.__name__ in ("AcceleratorError", "CalledProcessError")
    return named or any(words in str(error) for words in GPU_WORDS)


def printable(text: str) -> str:
    """Replace unprintable characters, such as line breaks and marks of direction, by escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fitted(line: str) -> list[str]:
    """Wrap text to lines of at most WIDTH columns. A longer word, such as a path, is not broken."""
    wrapped = textwrap.wrap(
        printable(line), WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [""]


def shown(text: object, limit: int = 200) -> str:
    """Make untrusted text safe to print: on one line, with escapes, cut after `limit` characters."""
    text = str(text)
    line = printable(text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text)} characters)"


def counted(number: int, thing: str) -> str:
    """Write a number and a noun in singular or plural: "1 window", "2 windows"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def errors_in_one_line(
    what: str, advice: str = "", limit: int = 200, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn any error of a library inside the `with` block into an InputError of one line.

    Args:
        what: the first words of the message: what could not be done.
        advice: the remedy, at the end of the message.
        limit: most characters of the library's message.
        passing: exceptions that are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        # Full memory is not a wrong input, though torch has no single class for it. A NameError is a mistake in code.
        full = any(words in str(error) for words in ("DefaultCPUAllocator", "out of memory"))
        if full or is_gpu_failure(error) or isinstance(error, (InputError, MemoryError, NameError, *passing)):
            raise
        raise InputError("; ".join(filter(None, [f"{what}: {shown(first_line(error), limit)}", advice]))) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError inside the `with` block that has no file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        # An OSError without errno has only a message, which a file name would hide.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
