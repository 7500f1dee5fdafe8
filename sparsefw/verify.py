"""Check a pruned checkpoint against its report and its source: `python -m sparsefw.verify OUTPUT [--against MODEL]`.

It checks the digests of all files. Then it reads the checkpoint block by block, and checks that

- it loads, without NaN or Inf, and has the layers that the report names;
- no layer has more weights than the pattern allows;
- all tensors but the pruned layers equal the source's, bit for bit, and so do kept weights if nothing has moved them;
- after --keep-zeros, zeros of the source are still zeros.

Exit status 0: all checks passed; 1: a check failed, and its failures are listed; 2: bad input, such as a folder without
a report.
"""

import sys

from sparsefw.cli import Parser, folder, launched, load_libraries, say


def main(argv: list[str] | None = None) -> int:
    """Verify from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        parser = Parser("verify", __doc__)
        parser.add_argument("output", type=folder, metavar="OUTPUT", help="folder that sparsefw wrote")
        parser.add_argument(
            "--against",
            metavar="ID|PATH",
            help="the checkpoint that was pruned (default: the one in the report, if it is a folder here)",
        )
        parser.add_argument(
            "--digest",
            metavar="HEX",
            help="SHA-256 of OUTPUT/SHA256SUMS, as printed by the run; with it, any changed file is found",
        )
        arguments = parser.parse_args(argv)
        load_libraries()
        from sparsefw.extras.verification import lines, verify

        verdict = verify(arguments.output, arguments.against, arguments.digest)
        for line in lines(verdict):
            say(line)
        outcome.status = 1 if verdict.failed else 0
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
