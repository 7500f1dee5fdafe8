"""The command line: a command is launched, its flags are parsed, and its lines are printed.

An error is one line on stderr, and the exit status says what became of the command. It may be killed at any time: what
a run has finished is safe on the disk, and the same command goes on from there. So signals need no care. Whatever takes
seconds to import is imported inside of a command, so that --help does not wait for it.
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
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

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

COMMANDS = ("run", "plan", "verify", "evaluate", "recover", "pack", "unpack")

# Exit statuses. The third one, EX_SOFTWARE of sysexits.h, is none that a failed check could have. The last one is that
# of Ctrl-C in a shell.
FAILED, BAD_INPUT, MISTAKE, INTERRUPTED = 1, 2, 70, 130

# Seconds that a rank which has lost another one gives the launcher.
PATIENCE = 10

# The type of an argument that is a folder.
folder = partial(checked_path, "folder")


def main() -> int:
    """The command `sparsefw`: its first argument names one of `COMMANDS`, whose arguments follow."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        return int(importlib.import_module(f"sparsefw.{name}").main())
    print(f"usage: sparsefw {{{','.join(COMMANDS)}}} ... (--help after a command lists its options)", file=sys.stderr)
    return 0 if name in ("-h", "--help") else BAD_INPUT


@dataclass
class Outcome:
    """What became of a command.

    Attributes:
        status: exit status: 0; 1 (a run or a check failed), 2 (bad input), 70 (a mistake in sparsefw), 130 (Ctrl-C).
    """

    status: int = 0


@contextmanager
def launched(argv: list[str] | None) -> Iterator[Outcome]:
    """Run the command inside the `with` block: an error becomes its line on stderr and its exit status.

    Args:
        argv: the arguments of the command; None: those of the process, which ends with the block.
    """
    outcome, rank = Outcome(), os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    if argv is None:
        _prepare_process(rank)
    try:
        with by_command():
            yield outcome
    except BrokenPipeError:
        # stdout is flushed once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome.status = FAILED
    except (Exception, KeyboardInterrupt) as error:
        outcome.status, message = _outcome(error)
        if type(error).__name__ == "LostRankError":
            # Another rank has failed. The launcher names it, and ends this one meanwhile.
            time.sleep(PATIENCE)
        line = printable("; ".join([message, *getattr(error, "__notes__", [])]))
        print(f"sparsefw: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr)
    if argv is None:
        _end_process(rank, outcome.status)


def _end_process(rank: str, status: int) -> None:
    """End the process, unless a launcher waits for what its function returns."""
    if rank and not status:
        # Bindings of Triton report what is not freed at the end.
        gc.unfreeze()
        return
    # Python's end takes seconds to free what libraries have made, and waits for transfers with ranks that are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit status and the message of an exception; the traceback of a mistake is printed."""
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
        # torch has no class of its own for it.
        return FAILED, "the host's memory is full; give fewer or shorter windows (--nsamples, --seqlen)"
    if name == "AcceleratorError" and "out of memory" in on_one_line:
        # CUDA's own: pinned memory of the host, or what CUDA itself takes of a GPU.
        return FAILED, f"memory is full; give less (--host-memory, --gpu-memory), or fewer windows: {on_one_line}"
    if isinstance(error, OSError | FloatingPointError) or name in ("OutOfMemoryError", "LostRankError"):
        return FAILED, on_one_line
    traceback.print_exception(error)
    if is_gpu_failure(error):
        line = shown(first_line(error))
        return FAILED, f"Triton or CUDA failed, see above: {name}: {line}; --kernel torch needs no Triton kernels"
    return MISTAKE, f"a mistake in sparsefw, with the traceback above: please report it ({name})"


def _prepare_process(rank: str) -> None:
    """Print by lines, of several ranks on the first alone. Garbage is collected from `load_libraries` on."""
    gc.disable()
    if rank not in ("", "0"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # A full disk shows while it can be reported. Characters that the terminal does not have are spelled out.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """Refuses flags as everything else is refused, without the usage, which --help prints."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"sparsefw {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse flags.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message} (--help lists the options)")


def run_parser(description: str | None, command: str = "run") -> Parser:
    """The parser of `sparsefw run`: flags for all fields of Inputs, PruneConfig and Output."""
    parser = Parser(command, description)
    for f in (*fields(Inputs), *fields(PruneConfig), *fields(Output)):
        add_flag(parser, f)
    return parser


def add_flag(parser: Parser, f: Field, default: str = "") -> None:
    """Add the flag of a dataclass's field; `default` says what stands for the field's own."""
    text, several = f.metadata["help"], f.metadata["several"]
    if default:
        text = f"{text.partition(' (default:')[0]} (default: {default})"
    if f.type in (bool, "bool"):
        parser.add_argument(flag_of(f.name), dest=f.name, action="store_true", help=text, default=None)
        return
    if f.default is not DEPENDS and not several and "(default:" not in text:
        text = f"{text} (default: {f.default})"
    kinds: dict[Any, type] = {int: int, float: float, int | None: int, float | None: float, Path: Path}
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
    """The inputs, the config and the output of the parsed flags.

    Raises:
        InputError: a value is out of its range, or values do not go together.
    """
    inputs = Inputs(**given(arguments, Inputs))
    return inputs, PruneConfig(**inputs.options | given(arguments, PruneConfig)), Output(**given(arguments, Output))


def given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The values of a dataclass's fields that were given as flags."""
    values = {f.name: getattr(arguments, f.name, None) for f in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def refuse_ranks(command: str) -> None:
    """Refuse a start by torchrun.

    Raises:
        InputError: there are several ranks.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{command} is one process: start it without torchrun")


def say(line: str) -> None:
    """Print a line on stdout. Names in it come from files: what does not print is spelled out."""
    print(printable(line))


def say_fitted(lines: Iterable[str]) -> None:
    """Print lines on stdout, each in as many as a terminal takes."""
    for line in lines:
        print(*fitted(line), sep="\n")


def load_libraries() -> None:
    """Load torch and transformers, which takes seconds; a terminal is told. They print nothing but errors and warnings.

    Each warning is on one line, in which names are spelled out. transformers prints no warnings either: what matters of
    them is checked here, or comes with an exception.
    """
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers ...", file=sys.stderr)
    from transformers import PreTrainedModel  # noqa: F401  # loads what every model needs
    from transformers.utils import logging

    if not gc.isenabled():
        # Objects of libraries are no garbage. To look through them while they load, and later again, takes a second.
        gc.freeze()
        gc.enable()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.formatwarning = lambda message, category, *_: printable(f"{category.__name__}: {message}") + "\n"
