"""Check a pruned checkpoint against its report and its source: `sparsefw verify OUTPUT [--against MODEL]`.

It checks that all files are those that the run wrote. It reads them again, block by block, and checks that they are
sound, that no layer has more weights than the pattern allows, that all other tensors are the source's, bit for bit,
as are kept weights unless they were refitted, and after --keep-zeros that the source's zeros are zero. Exit status 0:
all is well; 1: a check failed, and the culprits are listed; 2: bad input, as where there is nothing to check.
"""

import sys

from sparsefw.cli import Parser, folder, launched, load_libraries, say


def main(argv: list[str] | None = None) -> int:
    """Verify from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        parser = Parser("verify", __doc__)
        parser.add_argument("output", type=folder, metavar="OUTPUT", help="folder that sparsefw run wrote")
        parser.add_argument(
            "--against",
            metavar="ID|PATH",
            help="the checkpoint that was pruned (default: what the report names, where that is a folder here)",
        )
        parser.add_argument(
            "--digest",
            metavar="HEX",
            help="SHA-256 of OUTPUT/SHA256SUMS, as the run has printed it: with it no change of any file goes unseen",
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
