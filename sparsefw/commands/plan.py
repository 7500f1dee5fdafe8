"""Plan a run: `python -m sparsefw.plan --model MODEL --gpu h100`, with the flags of `sparsefw.run`.

A plan needs config.json alone, and downloads nothing else. It tells peak memory by phase, what is held at once and
where, and disk space.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sparsefw.cli import Parser, inputs_and_config, quiet_libraries, run_parser, say
from sparsefw.errors import InputError, first_line
from sparsefw.estimate.plan import CARDS, Machine, lines, plan
from sparsefw.flags import checked_path

EPILOG = "All flags of python -m sparsefw.run, too; there --help lists them. --model may be a config file."

# The defaults of a run on a GPU. The GPU that is planned for need not be in this machine.
ON_GPU = ("--kernel", "triton", "--precision", "bf16")


def run(argv: list[str] | None) -> int:
    """Plan a run, print the plan and write it as JSON."""
    quiet_libraries()
    parser = Parser("plan", __doc__, EPILOG)
    cards = f"on this card: {', '.join(CARDS)} (default: on this machine)"
    parser.add_argument("--gpu", choices=CARDS, metavar="CARD", help=cards)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    own, others = parser.parse_known_args(argv)
    content = _plan(own, others)
    if own.json:
        try:
            checked_path("json", own.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--json {own.json}: cannot be written: {first_line(error)}") from error
    for line in lines(content):
        say(line)
    return 0


def _plan(own: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    """The plan of the run that the other flags describe."""
    # The user's flags come later, and win.
    arguments = run_parser(__doc__).parse_args([*(ON_GPU if Machine(own.gpu).gpu else ()), *others])
    inputs, config = inputs_and_config(arguments)
    machine = Machine(own.gpu, arguments.gpu_memory, arguments.host_memory)
    return plan(inputs, config, machine, checked_path("output", arguments.output).resolve().parent)
