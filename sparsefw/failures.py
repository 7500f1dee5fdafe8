"""Tell an exception that ended a command: one line on stderr, and an exit status."""

import os
import platform
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from sparsefw import __version__
from sparsefw.errors import InputError, printable, shown
from sparsefw.signals import INTERRUPTED

if TYPE_CHECKING:
    from sparsefw.ranks.voice import Voice

# Exit statuses. The last one, EX_SOFTWARE of sysexits.h, is none that a failed check could have.
FAILED, BAD_INPUT, UNFORESEEN = 1, 2, 70

# Characters of the longest line; what is more is cut out of its middle.
LONGEST = 2000

# Libraries whose versions matter in a report.
LIBRARIES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets")


def tell(error: BaseException, interrupted: bool, voice: "Voice | None" = None) -> int:
    """Print the exception that ended a command, with its notes, on one line on stderr.

    Args:
        error: the exception.
        interrupted: whether a signal came before. Then the exception comes of it: libraries turn KeyboardInterrupt
            into exceptions of their own.
        voice: prints the line on one of several ranks.

    Returns:
        The exit status.
    """
    interrupted = interrupted or isinstance(error, KeyboardInterrupt)
    status, message = (INTERRUPTED, "interrupted") if interrupted else _outcome(error)
    line = printable("; ".join([message, *getattr(error, "__notes__", [])]))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    if voice:
        return voice.last_word(status, line, comes_of_others=interrupted or isinstance(error, _lost_rank()))
    # If nobody can be told, the status remains.
    with suppress(OSError):
        print(f"sparsefw: {line}", file=sys.stderr)
    return status


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit status and the message of an exception."""
    on_one_line = " ".join(str(error).split())
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, BrokenPipeError):
        return FAILED, "nobody reads what is printed (broken pipe)"
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, RuntimeError) and on_one_line.startswith("Symlink loop from"):
        # pathlib makes it of an error of the system, before Python 3.13.
        return BAD_INPUT, on_one_line
    if isinstance(error, _of("safetensors", "SafetensorError")):
        return BAD_INPUT, on_one_line
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in on_one_line:
        # torch has no class of its own for it.
        return FAILED, "the host's memory is full; give fewer or shorter windows (--nsamples, --seqlen)"
    if isinstance(error, _of("torch", "AcceleratorError")) and "out of memory" in on_one_line:
        # CUDA's own: page-locked memory of the host, or what CUDA itself takes of a GPU.
        return FAILED, f"memory is full; give less (--host-memory, --gpu-memory), or fewer windows: {on_one_line}"
    if isinstance(error, ImportError):
        return FAILED, f"a library cannot be loaded, check the installation: {on_one_line}"
    if isinstance(error, (FloatingPointError, *_of("torch", "OutOfMemoryError"), *_lost_rank())):
        return FAILED, on_one_line
    return UNFORESEEN, f"unforeseen {type(error).__name__}: {shown(on_one_line)}; {_reported(error)}"


def _of_system(error: OSError) -> tuple[int, str]:
    """An error of the system. It is bad input if it names a file: something that cannot be done with this one."""
    if error.filename is None:
        return FAILED, " ".join(str(error).split())
    return BAD_INPUT, f"{shown(os.fsdecode(error.filename))}: {error.strerror}"


def _of(module: str, name: str) -> tuple[type[BaseException], ...]:
    """A library's class of exceptions; nothing if the library has not been imported."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if found else ()


def _lost_rank() -> tuple[type[BaseException], ...]:
    return _of("sparsefw.ranks.group", "LostRankError")


def _reported(error: BaseException) -> str:
    """Write the traceback to a file; returns what the user can do with it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sparsefw-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(f"{printable(line)}\n" for line in _account(error)))
    except OSError as failure:
        return f"this is a mistake in sparsefw: please report it (its traceback cannot be written: {failure})"
    return f"this is a mistake in sparsefw: please report it, with the traceback in {file.name}"


def _account(error: BaseException) -> list[str]:
    """Versions, the command and the traceback."""
    loaded = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    versions = [f"{name} {getattr(module, '__version__', '')}" for name, module in loaded.items()]
    return [
        ", ".join([f"sparsefw {__version__}", f"Python {platform.python_version()}", *versions]),
        " ".join(sys.argv),
        *"".join(traceback.format_exception(error)).splitlines(),
    ]
