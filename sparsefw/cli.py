"""Launch a command of the command line, parse its flags, and print its lines.

An error becomes one line on stderr and an exit status. Signals are not handled: finished blocks are on the disk, and
the same command resumes after the last one. Commands import torch and transformers inside of their functions, so that
--help is fast.
"""

import argparse
import gc
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from sparsefw import __version__
from sparsefw.environment import set_environment
from sparsefw.errors import (
    InputError,
    by_command,
    first_line,
    fitted,
    flag_of,
    is_gpu_failure,
    printable,
    shown,
)
from sparsefw.fields import DEPENDS, checked_path
from sparsefw.inputs import Inputs, Output
from sparsefw.solver.config import PruneConfig

# A line about each command.
COMMANDS = {
    "run": "prune a checkpoint",
    "plan": "tell memory, placement and disk of a run beforehand",
    "verify": "check an output against its report and its source",
    "evaluate": "measure perplexities and tasks of checkpoints",
    "recover": "fit all kept weights of an output together",
    "pack": "leave out the zeros of an output",
    "unpack": "make a packed output dense again",
    "lm_eval": "the command of lm-evaluation-harness, with the model sparsefw",
}

# Exit statuses. MISTAKE is EX_SOFTWARE in sysexits.h. INTERRUPTED is the status that shells use for Ctrl-C.
FAILED, BAD_INPUT, MISTAKE, INTERRUPTED = 1, 2, 70, 130

# If another rank is lost, a rank waits this many seconds, in which the launcher may end it.
PATIENCE = 10


def folder(text: str) -> Path:
    """Convert an argument of the command line that names a folder."""
    try:
        return checked_path("folder", text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    """Run `sparsefw COMMAND ...`, where COMMAND is one of `COMMANDS`."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        return int(importlib.import_module(f"sparsefw.{name}").main())
    if name == "--version":
        print(f"sparsefw {__version__}")
        return 0
    helped = name in ("-h", "--help")
    unknown = [f"sparsefw: {shown(name)}: no such command", ""] if name and not helped else []
    lines = [
        *unknown,
        "usage: python -m sparsefw.COMMAND ...",
        "",
        *(f"  {x:<9} {what}" for x, what in COMMANDS.items()),
        "",
        "--help after a command lists its flags",
    ]
    print("\n".join(lines), file=sys.stdout if helped else sys.stderr)
    return 0 if helped else BAD_INPUT


@dataclass
class Outcome:
    """The outcome of a command.

    Attributes:
        status: exit status: 0 (success), 1 (a run or a check failed), 2 (bad input), 70 (a mistake in sparsefw) or 130
            (Ctrl-C).
    """

    status: int = 0


@contextmanager
def launched(argv: list[str] | None) -> Iterator[Outcome]:
    """Run the command inside the `with` block. An error becomes a line on stderr and an exit status.

    Args:
        argv: the arguments of the command. None: the process's arguments; the process then ends with the block.
    """
    outcome, rank = Outcome(), os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    set_environment()
    if argv is None:
        _prepare_process(rank)
    try:
        with by_command():
            yield outcome
    except BrokenPipeError:
        # The reader of stdout is gone. The flush at the end of the process must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome.status = FAILED
    except (Exception, KeyboardInterrupt) as error:
        outcome.status, message = _outcome(error)
        if type(error).__name__ == "LostRankError":
            # Another rank has failed. The launcher names the failed rank, and ends this one.
            time.sleep(PATIENCE)
        line = printable("; ".join([message, *getattr(error, "__notes__", [])]))
        print(f"sparsefw: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr)
    if argv is None:
        _end_process(rank, outcome.status)


def _end_process(rank: str, status: int) -> None:
    """End the process, except a rank that has succeeded, which returns to its launcher."""
    if rank and not status:
        # Objects must be freed at the end, or Triton's bindings report leaks.
        gc.unfreeze()
        return
    # A normal exit would free all objects of libraries, which takes seconds, and wait for transfers with lost ranks.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the message of an exception; a mistake in sparsefw also prints its traceback."""
    on_one_line = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return BAD_INPUT, f"{shown(os.fsdecode(error.filename))}: {error.strerror}"
    name = type(error).__name__
    if name == "SafetensorError":
        return BAD_INPUT, on_one_line
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in on_one_line:
        # If host memory is full, torch raises a RuntimeError with this word.
        return FAILED, "the host's memory is full; give fewer or shorter windows (--nsamples, --seqlen)"
    if name == "AcceleratorError" and "out of memory" in on_one_line:
        # An allocation of CUDA itself failed: pinned memory of the host, or the context on a GPU.
        return FAILED, f"memory is full; lower --host-memory or --gpu-memory, or give fewer windows: {on_one_line}"
    if isinstance(error, OSError | FloatingPointError) or name in ("OutOfMemoryError", "LostRankError"):
        return FAILED, on_one_line
    traceback.print_exception(error)
    if is_gpu_failure(error):
        line = shown(first_line(error))
        return FAILED, f"Triton or CUDA failed, see above: {name}: {line}; --kernel torch needs no Triton kernels"
    return MISTAKE, f"a mistake in sparsefw, with the traceback above: please report it ({name})"


def _prepare_process(rank: str) -> None:
    """Make stdout print line by line, only on the first rank, and stop garbage collection until `load_libraries`."""
    gc.disable()
    if rank not in ("", "0"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Each line is flushed, so that a full disk is noticed early. Characters that the terminal lacks are escaped.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError for wrong flags, without printing the usage."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m sparsefw.{command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse wrong flags.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message} (--help lists the options)")


def run_parser(description: str | None, command: str = "run") -> Parser:
    """Make the parser of a run, with flags for all fields of Inputs, PruneConfig and Output."""
    parser = Parser(command, description)
    for f in (*fields(Inputs), *fields(PruneConfig), *fields(Output)):
        add_flag(parser, f)
    return parser


def add_flag(parser: Parser, f: Field, default: str = "") -> None:
    """Add the flag of a dataclass's field. `default`, if not empty, replaces the field's default in the help."""
    text, several = f.metadata["help"], f.metadata["several"]
    if default:
        text = f"{text.partition(' (default:')[0]} (default: {default})"
    if f.type is bool:
        parser.add_argument(flag_of(f.name), dest=f.name, action="store_true", help=text, default=None)
        return
    if f.default is not DEPENDS and not several and "(default:" not in text:
        text = f"{text} (default: {f.default})"
    kinds: dict[Any, type] = {int: int, float: float, int | None: int, float | None: float}
    parser.add_argument(
        flag_of(f.name),
        dest=f.name,
        type=kinds.get(f.type, str),
        action="append" if several else "store",
        choices=f.metadata["choices"],
        metavar=f.metadata["metavar"],
        help=text.replace("%", "%%"),
    )


def settings_of(arguments: argparse.Namespace) -> tuple[Inputs, PruneConfig, Output]:
    """Make the inputs, the config and the output from parsed flags.

    Raises:
        InputError: a value is out of range, or two values contradict each other.
    """
    inputs = Inputs(**given(arguments, Inputs))
    return inputs, PruneConfig(**inputs.options | given(arguments, PruneConfig)), Output(**given(arguments, Output))


def given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return by name the values that the user set by flags, for the fields of a dataclass."""
    values = {f.name: getattr(arguments, f.name, None) for f in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def refuse_ranks(command: str) -> None:
    """Refuse to run on several ranks.

    Raises:
        InputError: torchrun has started several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{command} is one process: start it without torchrun")


def say(line: str) -> None:
    """Print a line on stdout. Unprintable characters, which names from files may have, are escaped."""
    print(printable(line))


def say_fitted(lines: Iterable[str]) -> None:
    """Print lines on stdout, wrapped to the width of a terminal."""
    for line in lines:
        print(*fitted(line), sep="\n")


def load_libraries() -> None:
    """Load torch and transformers, which takes seconds, and say so in a terminal.

    After this transformers prints errors only, because this package itself checks for the causes of its warnings. Other
    warnings are printed in one line each, with unprintable characters escaped.
    """
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers ...", file=sys.stderr)
    from transformers import PreTrainedModel  # noqa: F401  # imports what every model needs
    from transformers.utils import logging

    if not gc.isenabled():
        # Exclude objects of the libraries from garbage collection: they stay, and searching them takes a second.
        gc.freeze()
        gc.enable()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.formatwarning = lambda message, category, *_: printable(f"{category.__name__}: {message}") + "\n"
