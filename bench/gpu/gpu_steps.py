"""The first hour on a GPU, in five steps: `bench/gpu.sh FOLDER STEP` for STEP = 1 to 5, in this order.

    1  compile all kernels for this card with many processes; run the kernels' tests; roofs
    2  steps of a reconstruction on one block; a block of Llama-3-70B's sizes without one, under the profiler; 8B blocks
       fitted together
    3  products, Gram and cross matrices, exact products, row kernels and packed matrices, beside the library and their
       roofs; hundreds of repeats, bits compared
    4  a 70B block by default, activations on the GPU; 8B blocks cold, warm, and killed
    5  what may be left for another hour: activations in host memory, 8B blocks within 16 GiB

A step ends within 8 minutes. Each of its parts is a process with a time limit of its own, so neither a hang nor a fault
of the GPU takes the others with it. Results go to FOLDER/results.jsonl line by line, what a part prints to
FOLDER/NAME.txt. All steps take one FOLDER: times are compared with the roofs that are there. This project need not be
installed, nor is there any need of a network, of `datasets`, or of plugins of pytest. What is needed and not there is
named before anything starts: images for CUDA often lack msgspec, a wheel without dependencies.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gpu_lines import Part

# Modules that the parts import.
NEEDED = ["torch", "triton", "transformers", "safetensors", "psutil", "jinja2", "tqdm", "msgspec", "filelock", "pytest"]

# Every step's parts: limit in seconds, module and function. A step's limits add up to less than 8 minutes.
STEPS = {
    "1": {
        "machine": (60, "gpu_compile.machine"),
        "compile": (90, "gpu_compile.compile_kernels"),
        "kernel tests": (240, "gpu_compile.kernel_tests"),
        "roofs": (40, "gpu_products.roofs"),
    },
    "2": {
        "reconstruction": (130, "gpu_reconstruct.steps"),
        "block compiled": (110, "gpu_runs.block_compiled"),
        "block profiled": (110, "gpu_runs.block_profiled"),
        "recovery": (110, "gpu_runs.recovered"),
    },
    "3": {
        "product": (90, "gpu_products.products"),
        "gram": (50, "gpu_products.grams"),
        "cross": (50, "gpu_products.crosses"),
        "exact": (60, "gpu_products.exact_products"),
        "row kernels": (100, "gpu_rows.row_kernels"),
        "repeats": (80, "gpu_rows.repeats"),
        "packed": (40, "gpu_products.packed"),
    },
    "4": {
        "block on the GPU": (120, "gpu_runs.block_on_the_gpu"),
        "8B cold": (100, "gpu_runs.cold"),
        "8B warm": (80, "gpu_runs.warm"),
        "8B killed": (130, "gpu_runs.killed"),
    },
    "5": {
        "block in host memory": (150, "gpu_runs.block_in_host_memory"),
        "8B within 16 GiB": (100, "gpu_runs.within"),
    },
}
# The parts of rehearsal.py. Their limits add up to less than ten minutes.
REHEARSAL = {
    "machine": (20, "gpu_compile.machine"),
    "probe": (40, "rehearsal.probe"),
    "first command": (100, "rehearsal.first_command"),
    "kernel tests": (230, "gpu_compile.kernel_tests"),
    "8B block": (120, "rehearsal.block"),
    "row step bench": (80, "rehearsal.row_step"),
}
# Operations are parts, too.
FUNCTIONS = {name: path for parts in (*STEPS.values(), REHEARSAL) for name, (_, path) in parts.items()}
FUNCTIONS |= dict(gram_accumulate=FUNCTIONS["gram"], cross_accumulate=FUNCTIONS["cross"])
FUNCTIONS["packed_product"] = FUNCTIONS["packed"]
FUNCTIONS |= dict.fromkeys(("row_step", "conjugate_step", "lmo", "adam_step"), "gpu_rows.row_kernels")


def command_of(part: Part) -> list[str]:
    """The command that runs a part in a process of its own."""
    command = [sys.executable, str(Path(__file__)), str(part.folder), part.name, "--scratch", str(part.scratch)]
    return [*command, *["--tiny"] * part.tiny]


def output_path(part: Part) -> Path:
    """The file of what a part prints."""
    return part.folder / f"{part.name.replace(' ', '-')}.txt"


def run_limited(part: Part, limit: float) -> None:
    """Run a part in a process of its own, and add a line that says how it ended.

    Args:
        part: the part.
        limit: seconds after which it is killed, with all processes that it has started.
    """
    started, path = time.monotonic(), output_path(part)
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
            # A part that has ended may have left others.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    part.add(end=end, seconds=round(time.monotonic() - started, 1), **{} if end == "done" else {"last_lines": last})


def parsed(
    description: str | None, argv: list[str] | None, needed: list[str], steps: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Parse the arguments of a script, and make its folders.

    Args:
        description: of the script.
        argv: the arguments; None: those of the process.
        needed: modules that must be installed.
        steps: values of the argument STEP, if there is one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="folder of the results")
    if steps:
        add("step", choices=steps, metavar="STEP", help="1 to 5, or the name of a part or an operation")
    add("--scratch", default=Path(tempfile.gettempdir()) / "sparsefw-gpu", metavar="DIR",
        help="folder for checkpoints and caches, 30 GB (default: %(default)s)")  # fmt: skip
    add("--tiny", action="store_true", help="tiny sizes, to try everything out without a GPU")
    arguments = parser.parse_args(argv)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"not installed: {' '.join(missing)}")
    if arguments.tiny:
        # Set before a part imports triton.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    arguments.folder, arguments.scratch = (Path(path).resolve() for path in (arguments.folder, arguments.scratch))
    for path in (arguments.folder, arguments.scratch):
        path.mkdir(parents=True, exist_ok=True)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run a step, part by part, or a single part."""
    arguments = parsed(__doc__, argv, NEEDED, (*STEPS, *FUNCTIONS))
    folder, scratch = arguments.folder, arguments.scratch
    if arguments.step in FUNCTIONS:
        module, _, function = FUNCTIONS[arguments.step].partition(".")
        getattr(importlib.import_module(module), function)(Part(arguments.step, folder, scratch, arguments.tiny))
        return
    for name, (limit, _) in STEPS[arguments.step].items():
        run_limited(Part(name, folder, scratch, arguments.tiny), limit)


if __name__ == "__main__":
    main()
