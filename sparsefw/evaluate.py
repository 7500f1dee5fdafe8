"""The command `python -m sparsefw.evaluate`, the same as `sparsefw evaluate`."""

import sys

from sparsefw.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Evaluate from the command line; returns the exit status, see `launch`."""
    return launch("evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
