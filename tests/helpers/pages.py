"""The report of a run, with other arguments."""

from collections.abc import Iterable
from dataclasses import asdict, replace

from sparsefw.api import given_arguments
from sparsefw.cli import run_parser, settings_of
from sparsefw.report.content import Report, read_report

# A run of two methods that evaluates both.
REPORTED = ("--compare", "wanda", "--eval", "default", "--eval-windows", "3")


def parsed(arguments: Iterable[str]) -> dict[str, dict]:
    """The arguments of a report and those that were given, from a command line."""
    inputs, config, output = settings_of(run_parser(None).parse_args([*arguments]))
    found = asdict(inputs) | asdict(config.for_calibration(8, 128)) | asdict(output)
    found |= {"output": str(found.pop("folder")), "compare": config.compare[:1]}
    return {"arguments": found, "given": given_arguments(inputs, config, None)}


def report_of_run(pruned, *arguments: str) -> Report:
    """The report of a run of wanda and sparsefw, as if it had had these arguments."""
    _, output = pruned(*REPORTED)
    report = read_report(output / "report.json")
    return replace(report, **parsed(["--sparsity", "0.5", "--output", "out", *arguments]))
