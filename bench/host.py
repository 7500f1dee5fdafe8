"""Name this checkout and this machine, without imports that take seconds."""

import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def output(*command: str) -> str | None:
    """Run a command in this checkout; returns what it prints, or None if it fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip() or None
    return None


def commit() -> str | None:
    """Name the commit of this checkout."""
    return output("git", "describe", "--always", "--dirty")


def cpu() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text("utf-8")) if path.exists() else None
    return found[1] if found else platform.processor()
