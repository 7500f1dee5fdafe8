"""The exception for mistakes that a user can mend, and what messages are made of."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Flags that have another name than their field.
SHORT = {"evaluate": "--eval", "texts": "--eval", "folder": "--output"}

# The user has made a call from Python or, see `by_command`, a command. Messages name options as they stand in it.
_invocation = "call"

# Words in the errors of CUDA, of its libraries and of Triton's launcher, which have no class of their own.
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

# Columns of a terminal that a line of a run takes.
WIDTH = 100


class InputError(ValueError):
    """The user gave something wrong; the message is one line that names the culprit and the remedy.

    Names in it come from files and from the command line. Whatever does not print is spelled out, so that no message
    can break its line or speak to a terminal.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


@contextmanager
def by_command() -> Iterator[None]:
    """Inside the `with` block, messages speak to a user of the command line."""
    global _invocation
    before, _invocation = _invocation, "command"
    try:
        yield
    finally:
        _invocation = before


def invocation() -> str:
    """The user's way, for messages: "call" or "command"."""
    return _invocation


def flag_of(name: str) -> str:
    """The flag of a field or of an argument."""
    return SHORT.get(name) or f"--{name.replace('_', '-')}"


def option(name: str, value: object = None) -> str:
    """An option as the user writes it: `reconstruct=0` in Python, `--reconstruct 0` on the command line.

    Args:
        name: name of the field or of the argument.
        value: its value; None: the option without a value.
    """
    if _invocation == "command":
        return flag_of(name) if value is None or value is True else f"{flag_of(name)} {shown(value)}"
    return name if value is None else f"{name}={shown(repr(value))}"


def worded(flag: str) -> str:
    """A flag as the user writes it, see `option`; unchanged what is no flag."""
    return option(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else flag


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with what a colon at its end announces; without one, its name."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *others[:1]]) if first.endswith(":") else first


def is_gpu_failure(error: BaseException) -> bool:
    """Whether Triton or CUDA has failed: a kernel does not compile, launch or end, or there is no compiler for it."""
    kind = type(error)
    named = kind.__module__.startswith("triton.") or kind.__name__ in ("AcceleratorError", "CalledProcessError")
    return named or any(words in str(error) for words in GPU_WORDS)


def printable(text: str) -> str:
    """Text on one line, in which every character that does not print is spelled out: controls, marks of direction."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fitted(line: str) -> list[str]:
    """Text as `printable`, in lines of at most WIDTH columns; a longer word, such as a path, stays whole."""
    wrapped = textwrap.wrap(
        printable(line), WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [""]


def shown(text: object, limit: int = 200) -> str:
    """Text from a checkpoint, made safe to print: on one line, without control characters, cut where it is long."""
    text = str(text)
    line = printable(text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text)} characters)"


def counted(number: int, thing: str) -> str:
    """A number of things, as "1 window" and "2 windows"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def errors_in_one_line(
    what: str, advice: str = "", limit: int = 200, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Make an error of a library, which may be any exception but `passing`, one of the input.

    Args:
        what: what could not be done.
        advice: what the user may do.
        limit: characters of the library's own line.
    """
    try:
        yield
    except Exception as error:
        # Full memory is no mistake of the input, and torch has several errors for it. A NameError is one in code.
        full = any(words in str(error) for words in ("DefaultCPUAllocator", "out of memory"))
        if full or is_gpu_failure(error) or isinstance(error, (InputError, MemoryError, NameError, *passing)):
            raise
        raise InputError("; ".join(filter(None, [f"{what}: {shown(first_line(error), limit)}", advice]))) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the system inside the `with` block. A full disk, for one, names none."""
    try:
        yield
    except OSError as error:
        # Without a number it is a message alone, which a name would replace.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
