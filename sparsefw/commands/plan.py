"""Plan a run: `python -m sparsefw.plan --model MODEL --gpu h100`, with the flags of `sparsefw.run`.

A plan needs config.json alone, and downloads nothing else. It tells flops and bytes by phase, peak memory, disk space
and hours. Matrix products and the package's own kernels are counted. The work that torch does between them is not. So
flops, bytes and hours are lower bounds.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sparsefw.cli import Parser, inputs_and_config, quiet_libraries, run_parser, say
from sparsefw.errors import InputError, first_line
from sparsefw.estimate.plan import Machine, RateFlags, plan
from sparsefw.estimate.rates import CARDS, NETWORK, UNITS
from sparsefw.estimate.tables import lines
from sparsefw.flags import checked_path

EPILOG = "All flags of python -m sparsefw.run, too; there --help lists them. --model may be a config file."

# The defaults of a run on a GPU. The GPU that is planned for need not be in this machine.
ON_GPU = ("--kernel", "triton", "--precision", "bf16")


def run(argv: list[str] | None) -> int:
    """Plan a run, print the plan and write it as JSON."""
    quiet_libraries()
    own, others = _parser().parse_known_args(argv)
    content = _plan(own, others)
    if own.json:
        _write(own.json, content)
    for line in lines(content):
        say(line)
    return 0


def _parser() -> Parser:
    """The plan's own flags."""
    parser = Parser("plan", __doc__, EPILOG)
    add = parser.add_argument
    add("--gpu", choices=CARDS, metavar="CARD", help=f"on this card: {', '.join(CARDS)} (default: on this machine)")
    add("--tflops", action="append", default=[], metavar="N|UNIT=N", help="rate of matrix products, in 10^12 flops a "
        f"second: of all units, or of one of {', '.join(UNITS)}; may be repeated")  # fmt: skip
    add("--bandwidth", type=_gigabytes, metavar="N", help="of the device's memory, in 10^9 bytes a second")
    add("--disk", type=_gigabytes, metavar="N", help="rate of reading and writing, in 10^9 bytes a second (default: it "
        "costs no time)")  # fmt: skip
    add("--gpus", type=int, default=1, metavar="N", help="so many GPUs of a machine share the work (default: 1)")
    add("--nodes", type=int, default=1, metavar="M", help="so many machines share it, with --gpus each (default: 1)")
    add("--link", type=_gigabytes, metavar="N", help="rate at which a GPU sends to the others of its machine, in 10^9 "
        "bytes a second (default: about that of the card)")  # fmt: skip
    add("--network", type=_gigabytes, metavar="N", help="the same to other machines (default: "
        f"{NETWORK / 1e9:.0f})")  # fmt: skip
    add("--measure", action="store_true", help="measure --tflops and --bandwidth here, which takes seconds")
    add("--json", type=Path, metavar="FILE", help="write the same as JSON")
    return parser


def _gigabytes(text: str) -> float:
    """Read a rate in 10^9 bytes a second; returns bytes a second."""
    try:
        value = float(text) * 1e9
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return value


def _plan(own: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    """The plan of the run that the other flags describe."""
    # The user's flags come later, and win.
    arguments = run_parser(__doc__).parse_args([*(ON_GPU if Machine(own.gpu).gpu else ()), *others])
    inputs, config = inputs_and_config(arguments)
    machine = Machine(own.gpu, arguments.gpu_memory, arguments.host_memory, own.gpus, own.nodes)
    rate_flags = RateFlags(own.tflops, own.bandwidth, own.disk, own.measure, own.link, own.network)
    output = checked_path("output", arguments.output)
    return plan(inputs, config, machine, rate_flags, output.resolve().parent)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        checked_path("json", path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written: {first_line(error)}") from error
