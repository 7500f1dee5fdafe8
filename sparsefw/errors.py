"""The exception for wrong inputs, and the words and forms of messages."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Flags that have another name than their field.
SHORT = {"evaluate": "--eval", "texts": "--eval", "folder": "--output"}

# Messages name options as the user writes them: in a call from Python or, see `by_command`, in a command.
_invocation = "call"

# Words in the errors of CUDA, its libraries and Triton's launcher, which have no exception classes.
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

# Columns of a line in the log of a run.
WIDTH = 100


class InputError(ValueError):
    """An input is wrong; the message is one line that names the culprit and the remedy.

    Names in the message may come from files: escapes replace unprintable characters, so that no message breaks its line
    or controls a terminal.
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
    """Return how the user has started the run: "call" or "command"."""
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
    """Write a flag as the user does, see `option`; text that is no flag stays."""
    return option(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else flag


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, and the second if the first ends with a colon; or its name."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *others[:1]]) if first.endswith(":") else first


def is_gpu_failure(error: BaseException) -> bool:
    """Tell whether Triton or CUDA has failed to compile, launch or finish a kernel."""
    kind = type(error)
    named = kind.__module__.startswith("triton.") or kind.__name__ in ("AcceleratorError", "CalledProcessError")
    return named or any(words in str(error) for words in GPU_WORDS)


def printable(text: str) -> str:
    """Replace unprintable characters, such as controls and marks of direction, by escapes, which gives one line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fitted(line: str) -> list[str]:
    """Wrap printable text to lines of at most WIDTH columns; a longer word, such as a path, stays whole."""
    wrapped = textwrap.wrap(
        printable(line), WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [""]


def shown(text: object, limit: int = 200) -> str:
    """Make text from a checkpoint safe to print: on one line, with escapes, cut after `limit` characters."""
    text = str(text)
    line = printable(text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text)} characters)"


def counted(number: int, thing: str) -> str:
    """Count things in words: "1 window", "2 windows"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def errors_in_one_line(
    what: str, advice: str = "", limit: int = 200, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn any error of a library inside the `with` block into an InputError of one line.

    Args:
        what: the first words of the message: what could not be done.
        advice: what the user may do.
        limit: characters of the library's message.
        passing: exceptions that stay as they are.
    """
    try:
        yield
    except Exception as error:
        # Full memory, for which torch has several errors, is no wrong input; a NameError is a mistake in code.
        full = any(words in str(error) for words in ("DefaultCPUAllocator", "out of memory"))
        if full or is_gpu_failure(error) or isinstance(error, (InputError, MemoryError, NameError, *passing)):
            raise
        raise InputError("; ".join(filter(None, [f"{what}: {shown(first_line(error), limit)}", advice]))) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file to an error of the system inside the `with` block: a full disk names no file."""
    try:
        yield
    except OSError as error:
        # An error without a number is a message, which the name would replace.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
