"""The first hour on a GPU, in five steps: `bench/gpu.sh FOLDER STEP` for STEP = 1 to 5, in this order.

    1  compile all kernels for this card with many processes; run the kernels' tests
    2  roofs; products, Gram and cross matrices, exact products, each beside the library and its roof
    3  row kernels at the chunks of real runs; hundreds of repeats, bits compared; counters of the memory
    4  a block of Llama-3-70B's sizes under the profiler, activations on the GPU and in host memory
    5  blocks of Llama-3.1-8B's sizes: cold, warm, within 16 GiB, and killed

A step ends within 8 minutes. Each of its parts is a process with a time limit of its own, so neither a hang nor a fault
of the GPU takes the others with it. Results go to FOLDER/results.jsonl line by line, what a part prints to
FOLDER/NAME.txt. Needs torch, triton, transformers and pytest. This project need not be installed, nor is there any need
of a network, of `datasets`, or of plugins of pytest.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_lines import Part

BENCH = Path(__file__).resolve().parents[1]

# The parts of every step with their limits in seconds. A step's limits add up to less than 8 minutes.
STEPS = {
    1: {"machine": 30, "compile": 160, "kernel tests": 270},
    2: {"roofs": 60, "product": 130, "gram": 90, "cross": 90, "exact": 90},
    3: {"row kernels": 160, "repeats": 120, "counters": 180},
    4: {"block compiled": 130, "block on the GPU": 165, "block in host memory": 165},
    5: {"8B cold": 170, "8B warm": 70, "8B within 16 GiB": 90, "8B killed": 130},
}
# Module and function of every part.
PARTS = {
    "machine": "gpu_compile.machine",
    "compile": "gpu_compile.compile_kernels",
    "kernel tests": "gpu_compile.kernel_tests",
    "roofs": "gpu_products.roofs",
    "product": "gpu_products.products",
    "gram": "gpu_products.grams",
    "cross": "gpu_products.crosses",
    "exact": "gpu_products.exact_products",
    "row kernels": "gpu_rows.row_kernels",
    "repeats": "gpu_rows.repeats",
    "counters": "gpu_rows.counters",
    "counted": "gpu_rows.counted",
    "block compiled": "gpu_runs.block_compiled",
    "block on the GPU": "gpu_runs.block_on_the_gpu",
    "block in host memory": "gpu_runs.block_in_host_memory",
    "8B cold": "gpu_runs.cold",
    "8B warm": "gpu_runs.warm",
    "8B within 16 GiB": "gpu_runs.within",
    "8B killed": "gpu_runs.killed",
}


def run_part(part: Part) -> None:
    """Run a part in this process."""
    module, _, function = PARTS[part.name].rpartition(".")
    getattr(importlib.import_module(module), function)(part)


def command_of(part: Part) -> list[str]:
    """The command that runs a part in a process of its own."""
    command = [sys.executable, str(Path(__file__)), str(part.folder), part.name, "--scratch", str(part.scratch)]
    return [*command, *["--tiny"] * part.tiny]


def run_limited(part: Part, limit: float) -> None:
    """Run a part in a process of its own, and add a line that says how it ended.

    Args:
        part: the part.
        limit: seconds after which it is killed, with all processes that it has started.
    """
    started, path = time.monotonic(), part.folder / f"{part.name.replace(' ', '-')}.txt"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with path.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command_of(part), stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(limit)
            end = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            end = f"cut off after {limit:.0f} s; the lines before are good"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    told = {} if end == "done" else {"last_lines": last}
    part.add(end=end, seconds=round(time.monotonic() - started, 1), **told)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the results")
    parser.add_argument(
        "step", choices=[*map(str, STEPS), *PARTS], metavar="STEP", help="1 to 5, or the name of a part"
    )
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "sparsefw-gpu", metavar="DIR",
                        help="folder for checkpoints and caches, 30 GB (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try everything out without a GPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run a step, part by part, or a single part."""
    arguments = parse(argv)
    folder, scratch = arguments.folder.resolve(), arguments.scratch.resolve()
    for path in (folder, scratch):
        path.mkdir(parents=True, exist_ok=True)
    if arguments.step in PARTS:
        run_part(Part(arguments.step, folder, scratch, arguments.tiny))
        return
    for name, limit in STEPS[int(arguments.step)].items():
        run_limited(Part(name, folder, scratch, arguments.tiny), limit)


if __name__ == "__main__":
    main()
