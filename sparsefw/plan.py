"""The command `python -m sparsefw.plan`, the same as `sparsefw plan`."""

import sys

from sparsefw.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Plan from the command line; returns the exit status, see `launch`."""
    return launch("plan", argv)


if __name__ == "__main__":
    sys.exit(main())
