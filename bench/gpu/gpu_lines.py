"""Results as lines of JSON. Each line is on the disk as soon as it is known, so a run that is cut off loses none."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "results.jsonl"
REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """A part of a step: what it is called, and where it writes.

    Attributes:
        name: name of the part, which is in each of its lines.
        folder: folder of the results.
        scratch: folder for checkpoints and caches, which may become large.
        tiny: whether sizes are tiny, to try everything out where there is no GPU.
    """

    name: str
    folder: Path
    scratch: Path
    tiny: bool = False

    def add(self, **values: Any) -> None:
        """Append a line, and print it."""
        line = json.dumps({"part": self.name, **values})
        with (self.folder / NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    def lines(self, part: str) -> list[dict[str, Any]]:
        """All lines of a part so far, also those of earlier steps."""
        path = self.folder / NAME
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["part"] == part]

    def roofs(self) -> dict[str, float]:
        """Measured roofs: "copy" in bytes a second, others in flops a second by precision; the highest count."""
        rates = sorted((row["rate"], row["roof"]) for row in self.lines("roofs") if "roof" in row)
        return {roof: rate for rate, roof in rates}


def python(*arguments: object) -> list[str]:
    """Run Python in a process of its own, and print what it prints as it comes; returns the lines.

    Raises:
        SystemExit: its exit status was not 0.
    """
    command, lines = [sys.executable, *map(str, arguments)], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines
