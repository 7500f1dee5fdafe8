"""Run a command: `python -m sparsefw COMMAND ...`."""

import sys

from sparsefw.cli import main

if __name__ == "__main__":
    sys.exit(main())
