"""Make a packed checkpoint dense again: `sparsefw unpack PACKED OUTPUT`. Its tensors have the bits that were packed."""

import sys

from sparsefw.cli import launch
from sparsefw.pack import packer


def command(argv: list[str] | None) -> int:
    """Unpack a checkpoint."""
    return packer("unpack", __doc__, argv)


def main(argv: list[str] | None = None) -> int:
    """Unpack from the command line; returns the exit status, see `launch`."""
    return launch(command, argv)


if __name__ == "__main__":
    sys.exit(main())
