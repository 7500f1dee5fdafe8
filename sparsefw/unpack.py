"""Make a packed checkpoint dense again: `python -m sparsefw.unpack PACKED OUTPUT`. Tensors get the same bits back."""

import sys

from sparsefw.pack import packer


def main(argv: list[str] | None = None) -> int:
    """Unpack from the command line; returns the exit status, see `Outcome`."""
    return packer("unpack", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
