"""Make a packed checkpoint dense again: `python -m sparsefw.unpack PACKED OUTPUT`. Tensors get the same bits back."""

import sys

from sparsefw.cli import launched
from sparsefw.pack import packer


def main(argv: list[str] | None = None) -> int:
    """Unpack from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        packer("unpack", __doc__, argv)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
