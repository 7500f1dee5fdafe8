"""The command `python -m sparsefw.run`, the same as `sparsefw run`."""

import sys

from sparsefw.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Prune from the command line; returns the exit status, see `launch`."""
    return launch("run", argv)


if __name__ == "__main__":
    sys.exit(main())
