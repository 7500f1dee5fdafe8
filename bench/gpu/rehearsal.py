"""The first ten minutes with a GPU, on one page to send: `python bench/gpu/rehearsal.py FOLDER`.

    machine          the GPU, its driver, and versions
    probe            whether Triton compiles and runs a kernel here
    first command    README's first command, and `sparsefw.verify` of its output
    kernel tests     the tests of the kernels
    8B block         a random block of Llama-3.1-8B's sizes pruned by default: seconds by phase, memory beside a plan
    row step bench   times of a step of Frank-Wolfe, beside torch's

FOLDER/rehearsal.md says what passed, with the last lines of what failed. It is written anew after every part, so a
rehearsal that is cut off leaves a page, too. Each part is a process with a time limit (gpu_steps.py says more); the
limits add up to less than ten minutes. With --tiny all of it is tried out at tiny sizes, without a GPU.
"""

import json
import os
import sys
from typing import Any

from gpu_lines import NAME, REPO, Part, python
from gpu_steps import NEEDED, REHEARSAL, output_path, parsed, run_limited

PAGE, SHOWN = "rehearsal.md", 20
GIB = 2**30

# Places of a plan, and what is measured there.
MEASURED = {"gpu": "gpu_reserved_bytes", "host": "host_bytes"}
# The built-in model in seconds, on a CPU.
TINY_FLAGS = ["--nsamples", "4", "--seqlen", "32", "--steps", "2", "--reconstruct", "0", "--eval-windows", "1"]


def probe(part: Part) -> None:
    """Compile and run a kernel, as a run does before it begins."""
    import torch

    if not torch.cuda.is_available():
        part.add(summary="left out: no GPU is here")
        return
    python("-c", "from sparsefw.probe import probe_gpu; probe_gpu()")
    part.add(summary="Triton compiles and runs a kernel")


def first_command(part: Part) -> None:
    """README's first command, and a check of what it has written."""
    output = part.scratch / "first"
    lines = python("-m", "sparsefw.run", "--output", output, "--overwrite", *TINY_FLAGS * part.tiny)
    verified = python("-m", "sparsefw.verify", output)
    part.add(summary=verified[-1], output=lines[-SHOWN:])


def block(part: Part) -> None:
    """A block of Llama-3.1-8B's sizes by the default config. A plan tells memory, and no seconds."""
    from gpu_runs import run

    run(part, "8B block", "8B-block", cached=False)
    (row,) = (line for line in part.lines(part.name) if "run" in line)
    seconds, expected = row["seconds"], row["memory"]["expected"]
    phases = [f"{phase:12} {took:8.1f} s" for phase, took in seconds.items()]
    peaks = {place: row["peak_memory"][name] for place, name in MEASURED.items()}
    memory = [
        f"{place:12} {expected[place] / GIB:8.2f} GiB planned, {peaks[place] / GIB:.2f} measured" for place in expected
    ]
    part.add(summary=f"{sum(seconds.values()):.1f} s for one block of 32", phases=phases, memory=memory)


def row_step(part: Part) -> None:
    """`make bench` of the row step, but for the largest size."""
    import torch

    path = part.folder / "row_step.json"
    options = ["-q", "-k", "row_step and not 53248", "--benchmark-json", path, *["--gpu"] * torch.cuda.is_available()]
    python("-m", "pytest", *options, "bench/kernels/bench_operations.py")
    table = []
    for row in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        seconds, name = row["stats"]["median"], row["param"]
        table.append(f"{name:40} {1e3 * seconds:9.3f} ms {row['extra_info']['bytes'] / seconds / 1e9:8.1f} GB/s")
    part.add(summary=f"{len(table)} cases", times=table)


def page(parts: list[Part]) -> str:
    """The page: a table of the parts, then the figures of those that passed and the last lines of those that failed."""
    table, sections = ["| part | passed | seconds | |", "| --- | --- | --- | --- |"], []
    for part in parts:
        lines = part.lines(part.name)
        if not lines or "end" not in lines[-1]:
            table.append(f"| {part.name} | not run | | |")
            continue
        *rows, last = lines
        passed, printed = last["end"] == "done", output_path(part).read_text("utf-8", errors="replace").splitlines()
        summary = next((row["summary"] for row in rows if "summary" in row), "")
        cell = summary if passed else ": ".join([last["end"], *printed[-1:]]).replace("|", "\\|")
        table.append(f"| {part.name} | {'yes' if passed else '**no**'} | {last['seconds']} | {cell} |")
        # A line of a run has its whole report.
        shown = [row for row in rows if "run" not in row]
        figures = [line for row in shown for name, value in row.items() for line in _lines(name, value)]
        sections += [f"\n## {part.name}\n\n```text", *(figures if passed else printed[-SHOWN:]), "```"]
    return "\n".join(["# Rehearsal\n", *table, *sections, ""])


def _lines(name: str, value: Any) -> list[str]:
    """A value of a line of the results, as lines of the page: none of what the table has."""
    if name in ("part", "summary"):
        return []
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, dict):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    return [f"{name}: {value}"]


def main(argv: list[str] | None = None) -> int:
    """Run all parts, and write the page after each; returns 1 if a part has failed.

    Raises:
        SystemExit: there is no GPU, or the folder holds other results.
    """
    arguments = parsed(__doc__, argv, [*NEEDED, "pytest_benchmark"])
    import torch

    folder = arguments.folder
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --tiny tries everything out without one")
    if (folder / NAME).exists():
        raise SystemExit(f"{folder}: has results already; give another folder")
    folders = (REPO, *(REPO / "bench" / name for name in ("", "quality", "runs", "gpu")))
    os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
    parts = [Part(name, folder, arguments.scratch, arguments.tiny) for name in REHEARSAL]
    for part, (limit, _) in zip(parts, REHEARSAL.values(), strict=True):
        run_limited(part, limit)
        (folder / PAGE).write_text(page(parts), encoding="utf-8")
    print(f"{folder / PAGE}: the page to send")
    return int(any(part.lines(part.name)[-1]["end"] != "done" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
