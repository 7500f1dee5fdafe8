"""The command `python -m sparsefw.verify`, the same as `sparsefw verify`."""

import sys

from sparsefw.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Verify from the command line; returns the exit status, see `launch`."""
    return launch("verify", argv)


if __name__ == "__main__":
    sys.exit(main())
