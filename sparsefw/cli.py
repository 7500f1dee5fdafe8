"""Shared by the commands: flags made from the fields of Inputs, PruneConfig and Output, and what is printed."""

import argparse
import warnings
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging

from sparsefw.errors import InputError, printable
from sparsefw.flags import DEPENDS, flag_of
from sparsefw.inputs import Inputs, Output, config_for
from sparsefw.solver.config import PruneConfig


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
        _add_flag(parser, f)
    return parser


def _add_flag(parser: Parser, f: Field) -> None:
    text, several = f.metadata["help"], f.metadata["several"]
    if f.type in (bool, "bool"):
        parser.add_argument(flag_of(f.name), action="store_true", help=text, default=None)
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


def inputs_and_config(arguments: argparse.Namespace) -> tuple[Inputs, PruneConfig]:
    """The inputs and the config of the parsed flags.

    Raises:
        InputError: a value is out of its range, or values do not go together.
    """
    inputs = Inputs(**_given(arguments, Inputs))
    return inputs, config_for(inputs, _given(arguments, PruneConfig))


def output_of(arguments: argparse.Namespace) -> Output:
    """The output of the parsed flags.

    Raises:
        InputError: a value is out of its range.
    """
    return Output(**_given(arguments, Output))


def _given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The values of a dataclass's fields that were given as flags."""
    values = {f.name: getattr(arguments, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def say(line: str) -> None:
    """Print a line on stdout. Names in it come from files: what does not print is spelled out."""
    print(printable(line))


def quiet_libraries() -> None:
    """Have libraries print nothing but errors and warnings, each warning on one line in which names are spelled out.

    transformers prints no warnings either. What matters of them is checked here, or comes with an exception.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.formatwarning = lambda message, category, *_: printable(f"{category.__name__}: {message}") + "\n"
