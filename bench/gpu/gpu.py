"""Measure what works on a GPU, part by part: `python bench/gpu/gpu.py FOLDER [PART ...]`.

Without PART these parts run, within twelve minutes in all:

    machine          the GPU, its driver, and versions
    first command    README's first command, and `sparsefw.verify` of its output
    kernel tests     the tests of the kernels
    8B block         a random block of Llama-3.1-8B's sizes pruned by default: seconds by phase, memory and its plan
    row kernels      operations bound by bytes, compared with torch's: a step of Frank-Wolfe and others

and the others when they are named, each within four minutes:

    products, accumulations, packed
                     operations compared with the library's, and their share of the roof, by `python -m bench`
    8B cold, 8B warm, 8B within 16 GiB
                     two blocks with no kernel compiled, with all compiled, in little memory
    70B block, 70B in host memory, mixture block
                     blocks of Llama-3-70B's and Qwen3-30B-A3B's sizes; activations on the GPU, and on the host
    8B profiled      a block under the profiler: share of time in kernels, the longest ones, waits of the host

FOLDER/results.md is the page to send: how each part ended, and the last lines of its output. It is written after every
part. Each part is a process with a time limit of its own, so neither a hang nor a fault of the GPU ends the others. Its
results are lines of FOLDER/PART.jsonl, or the rows of FOLDER/PART.json where it compares operations, which are on the
disk as soon as they are known. Its output is FOLDER/PART.txt.
With --tiny all sizes are tiny, and no GPU is needed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
# The package of this checkout, whatever is installed, and the modules of bench/.
PATHS = [str(REPO / folder) for folder in ("", "bench", "bench/gpu", "bench/runs")]
sys.path[:0] = PATHS

# Lines of each part's output on the page.
SHOWN = 40
# (rows, d): chunks of a 70B run, and layers of 8B; in PRODUCTS also chunks that fill the waves of 132 multiprocessors.
CHUNKS = "6528x8192 1856x28672 4096x4096 4096x14336"
PRODUCTS = f"{CHUNKS} 4224x8192 10240x8192 4224x28672"
# The operations of parts, with their shapes.
OPERATIONS = {
    "row kernels": ("row_step conjugate lmo adam", CHUNKS),
    "products": ("product", PRODUCTS),
    "accumulations": ("gram cross", CHUNKS),
    "packed": ("packed", "4096x4096 8192x8192 8192x28672"),
}
# A run in seconds, on a CPU.
TINY_FLAGS = ["--nsamples", "4", "--seqlen", "32", "--steps", "1", "--refit", "1", "--rounds", "0"]


@dataclass(frozen=True)
class Part:
    """The run of a part.

    Attributes:
        name: name of the part.
        folder: folder of the results.
        scratch: folder of checkpoints and caches, which may become large.
        tiny: whether sizes are tiny.
    """

    name: str
    folder: Path
    scratch: Path
    tiny: bool

    def path(self, suffix: str) -> Path:
        """Name a file of this part."""
        return self.folder / f"{self.name.replace(' ', '-')}{suffix}"

    def add(self, **values: Any) -> None:
        """Append a line to the results, and print it."""
        line = json.dumps(values)
        with self.path(".jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    def lines(self) -> list[dict[str, Any]]:
        """Read the lines of the results so far."""
        path = self.path(".jsonl")
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def python(*arguments: object) -> None:
    """Run Python in a process of its own.

    Raises:
        SystemExit: its exit status was not 0.
    """
    if status := subprocess.run([sys.executable, *map(str, arguments)], cwd=REPO, check=False).returncode:
        raise SystemExit(status)


def describe(part: Part) -> None:
    """Describe the GPU, the machine and the versions."""
    import machine
    import torch
    import transformers

    for command in (["gcc", "--version"], ["nvidia-smi"]):
        with suppress(FileNotFoundError):
            subprocess.run(command, check=False)
    gpu = str(torch.cuda.get_device_properties(0)) if torch.cuda.is_available() else ""
    part.add(**machine.describe(), cpus=os.cpu_count(), gpu=gpu, transformers=transformers.__version__)


def first_command(part: Part) -> None:
    """Run README's first command, and verify its output. On a GPU the run compiles a kernel before it begins."""
    output = part.scratch / "first"
    tiny = [*TINY_FLAGS, "--eval-windows", "1"] * part.tiny
    python("-m", "sparsefw.run", "--output", output, "--overwrite", *tiny)
    python("-m", "sparsefw.verify", output)


def kernel_tests(part: Part) -> None:
    """Run the tests of the kernels on the GPU."""
    import torch

    tests = "tests/kernels/test_launch.py" if part.tiny else "tests/kernels"
    # A killed pytest shows no failure, one that stops by itself shows them all. `tested` counts the lines of -v.
    options = ["-m", "not slow", "--maxfail=10", *["--gpu"] * torch.cuda.is_available()]
    if find_spec("xdist") and not part.tiny:
        options += ["-n", min(12, os.cpu_count() or 1)]
    python("-m", "pytest", "-v", *options, tests)


def compare(part: Part) -> None:
    """Compare the operations of a part with their rivals. FOLDER/PART.json is for `python -m bench report`."""
    names, shapes = OPERATIONS[part.name]
    sizes = [word for shape in ("48x96" if part.tiny else shapes).split() for word in ("--shape", shape)]
    limits = ["--tokens", 100, "--seconds", 0.01] if part.tiny else ["--tokens", 16384, "--seconds", 0.5]
    providers = ["--providers", "ours,torch,library"]
    python("-m", "bench", *names.split(), *sizes, *limits, *providers, "--json", part.path(".json"))


def parts() -> dict[str, tuple[int, Callable[[Part], None]]]:
    """List all parts by name: the limit in seconds, and the function."""
    import gpu_runs as runs

    return {
        "machine": (20, describe),
        "first command": (150, first_command),
        "kernel tests": (300, kernel_tests),
        "8B block": (140, runs.prune),
        "row kernels": (90, compare),
        "products": (150, compare),
        "accumulations": (100, compare),
        "packed": (60, compare),
        "8B cold": (120, runs.prune_cold),
        "8B warm": (100, runs.prune),
        "8B within 16 GiB": (120, runs.prune),
        "70B block": (160, runs.prune),
        "70B in host memory": (200, runs.prune),
        "mixture block": (160, runs.prune),
        "8B profiled": (120, runs.profile),
    }


# The parts that run when no part is named.
FIRST = ("machine", "first command", "kernel tests", "8B block", "row kernels")


def run_limited(part: Part, limit: float) -> None:
    """Run a part in a process of its own, and add a line that says how it ended.

    Args:
        part: the part.
        limit: seconds until the part is killed, with all processes that it has started.
    """
    command = [sys.executable, __file__, str(part.folder), "--run", part.name, "--scratch", str(part.scratch)]
    command += ["--tiny"] * part.tiny
    started = time.monotonic()
    with part.path(".txt").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            status = process.wait(limit)
            end = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            end = f"cut off after {limit:.0f} s{tested(part)}"
        finally:
            # A part that has ended may have left others.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    part.add(end=end, part_seconds=round(time.monotonic() - started, 1))


def tested(part: Part) -> str:
    """Tell how many tests had ended when a part was cut off; nothing if it runs none."""
    words = part.path(".txt").read_text("utf-8", errors="replace").split()
    counts = {word: words.count(word) for word in ("PASSED", "FAILED", "ERROR")}
    return "".join(f", {count} {word.lower()}" for word, count in counts.items() if count)


def page(done: list[Part]) -> str:
    """Make the page: a table of the parts with the last line of each, then the last lines."""
    table, sections = ["| part | end | seconds | |", "| --- | --- | --- | --- |"], []
    for part in done:
        last, printed = part.lines()[-1], part.path(".txt").read_text("utf-8", errors="replace").splitlines()
        table.append(f"| {part.name} | {last['end']} | {last['part_seconds']} | {''.join(printed[-1:])[:80]} |")
        sections += [f"\n## {part.name}\n\n```text", *printed[-SHOWN:], "```"]
    return "\n".join(["# Results of a GPU\n", *table, *sections, ""])


def main(argv: list[str] | None = None) -> int:
    """Run parts, and write the page after each; returns 1 if a part has failed.

    Raises:
        SystemExit: there is no GPU, or no part has this name.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    scratch = Path(tempfile.gettempdir()) / "sparsefw-gpu"
    add("folder", type=Path, help="folder of the results")
    add("parts", nargs="*", metavar="PART", help="names of parts")
    add("--scratch", type=Path, default=scratch, help="folder of checkpoints, 30 GB (default: %(default)s)")
    add("--tiny", action="store_true", help="tiny sizes, to try everything out without a GPU")
    add("--run", metavar="PART", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    folder, scratch = arguments.folder.resolve(), arguments.scratch.resolve()
    for path in (folder, scratch):
        path.mkdir(parents=True, exist_ok=True)
    os.environ |= {"PYTHONPATH": os.pathsep.join(PATHS), "HF_HUB_OFFLINE": "1"}
    # Kernels are compiled into a cache of these parts.
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "cache")
    if arguments.tiny:
        # Set before a part imports torch and triton. Tiny sizes are those without a GPU.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    known = parts()
    every = {name: Part(name, folder, scratch, arguments.tiny) for name in known}
    if arguments.run:
        known[arguments.run][1](every[arguments.run])
        return 0
    import torch

    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --tiny tries everything out without one")
    if unknown := [name for name in arguments.parts if name not in known]:
        parser.error(f"{', '.join(unknown)}: no such part; there are {', '.join(known)}")
    done = [every[name] for name in arguments.parts or FIRST]
    for part in done:
        for suffix in (".jsonl", ".json"):
            part.path(suffix).unlink(missing_ok=True)
        run_limited(part, known[part.name][0])
        # Parts of earlier calls are on the page, too.
        (folder / "results.md").write_text(page([each for each in every.values() if each.lines()]), "utf-8")
    print(f"{folder / 'results.md'}: the page to send")
    return int(any(part.lines()[-1]["end"] != "passed" for part in done))


if __name__ == "__main__":
    sys.exit(main())
