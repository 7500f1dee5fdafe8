"""Shared by the commands: flags made from the fields of PruneConfig and Inputs, and lines that print."""

import argparse
import logging
import warnings
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from sparsefw.errors import InputError, printable
from sparsefw.flags import DEPENDS, flag_of
from sparsefw.inputs import Inputs, config_for
from sparsefw.solver.config import PruneConfig


class Parser(argparse.ArgumentParser):
    """Refuses flags as everything else is refused, without the usage, which --help prints."""

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"python -m sparsefw.{command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse flags.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message} (--help lists the options)")


def run_parser(description: str | None) -> Parser:
    """The parser of `sparsefw.run`: flags for all fields of Inputs and PruneConfig, for memory limits and output."""
    parser = Parser("run", description)
    for f in (*fields(Inputs), *fields(PruneConfig)):
        _add_flag(parser, f)
    add = parser.add_argument
    free = "(default: what is free, less a tenth)"
    add("--gpu-memory", type=float, metavar="GIB", help=f"the run takes at most this of the GPU's memory {free}")
    add("--host-memory", type=float, metavar="GIB", help=f"the run takes at most this of the host's memory {free}")
    add("--output", type=Path, default=Path("pruned"), metavar="DIR", help="folder for the result (default: pruned)")
    add("--overwrite", action="store_true", help="replace the older checkpoint in the output folder")
    add("--restart", action="store_true", help="discard what an interrupted run has finished; without it the same "
        "command goes on from there")  # fmt: skip
    return parser


def _add_flag(parser: Parser, f: Field) -> None:
    text, several = f.metadata["help"], f.metadata["several"]
    if f.type in (bool, "bool"):
        parser.add_argument(flag_of(f.name), action="store_true", help=text, default=None)
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


def inputs_and_config(arguments: argparse.Namespace) -> tuple[Inputs, PruneConfig]:
    """The inputs and the config of the parsed flags.

    Raises:
        InputError: a value is out of its range, or values do not go together.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    inputs = Inputs(**{f.name: given[f.name] for f in fields(Inputs) if f.name in given})
    return inputs, config_for(inputs, {f.name: given[f.name] for f in fields(PruneConfig) if f.name in given})


def say(line: str) -> None:
    """Print a line on stdout. Names in it come from files: what does not print is spelled out."""
    print(printable(line))


class _PrintableRecord(logging.LogRecord):
    """A line of a library's log, which may quote files."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def quiet_libraries() -> None:
    """Have libraries print nothing but errors and warnings, each on one line in which names are spelled out.

    transformers prints no warnings either. What matters of them is checked here, or comes with an exception.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = lambda message, category, *_: printable(f"{category.__name__}: {message}") + "\n"
