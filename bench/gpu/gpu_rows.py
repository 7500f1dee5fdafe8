"""Steps 3 and 5: row kernels at the chunks of real runs, whether bits repeat, and what a profiler counts of them."""

import shutil
import subprocess
from collections.abc import Callable
from functools import partial

import torch
from gpu_lines import Part
from gpu_products import measure
from gpu_steps import command_of
from operations import TINY, Operation, adam_step, conjugate_step, gram_accumulate, lmo, product, row_step
from torch import Tensor

# (rows, d): chunks of a 70B run, and a layer of an 8B run.
CHUNKS = [(6528, 8192), (1856, 28672), (4096, 4096), (4096, 14336)]

REPEATS = 200

# Counters of Nsight Compute: bytes from and to the memory, and the share of accesses that the L2 cache serves.
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_sector_hit_rate.pct")
# Launches of one kernel that are counted.
COUNTED = 3

OPERATIONS: dict[str, Callable[[int, int], Operation]] = {
    "row step": row_step,
    "row step, fp32 with a gap to the target": partial(row_step, target_gap=True),
    "row step, 2:4": partial(row_step, group=4),
    "conjugate step": conjugate_step,
    "lmo": lmo,
    "adam step": adam_step,
}
# The Gram matrix is of as many tokens as there are rows.
REPEATED = OPERATIONS | {"product": product, "gram": gram_accumulate}


def row_kernels(part: Part) -> None:
    """Times of the row kernels, or of one of them, and their share of the bandwidth of a copy."""
    named = {name: make for name, make in OPERATIONS.items() if name.startswith(part.name.replace("_", " "))}
    for name, make in (named or OPERATIONS).items():
        for rows, d in TINY if part.tiny else CHUNKS:
            measure(part, make(rows, d), "triton", operation=name, rows=rows, d=d)


def repeats(part: Part) -> None:
    """Every operation again and again from one state; all results must have the same bits."""
    count = 3 if part.tiny else REPEATS
    for name, make in REPEATED.items():
        for rows, d in TINY[:1] if part.tiny else CHUNKS[:2]:
            part.add(operation=name, rows=rows, d=d, **differing(partial(make(rows, d).result, "triton"), count))


def differing(result: Callable[[], tuple[Tensor, ...]], count: int) -> dict[str, int]:
    """How many of so many results have other bits than the first, and how many entries differ at most."""

    def bits() -> list[Tensor]:
        # Compared as integers: NaN equals NaN, and -0.0 differs from 0.0.
        return [x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize]) for x in result()]

    first, wrong, most = bits(), 0, 0
    for _ in range(count - 1):
        entries = sum(int((a != b).sum()) for a, b in zip(bits(), first, strict=True))
        wrong, most = wrong + bool(entries), max(most, entries)
    return {"repeats": count, "runs_that_differ": wrong, "most_entries_that_differ": most}


def counted(part: Part) -> None:
    """A few launches of every row kernel and of the product, for the profiler that runs this process."""
    for name, make in REPEATED.items():
        for rows, d in TINY[:1] if part.tiny else CHUNKS[:2]:
            operation = make(rows, d)
            for _ in range(COUNTED):
                operation.ways["triton"](*operation.fresh())
            print(f"{name}, {rows} x {d}: at least {operation.cost.bytes / 1e6:.1f} MB", flush=True)


def counters(part: Part) -> None:
    """Bytes of the memory and hits of the cache, as Nsight Compute counts them for our kernels: counters.csv."""
    tool = shutil.which("ncu")
    if not tool:
        part.add(skipped="ncu is not installed: no counters of the memory")
        return
    path, inner = part.folder / "counters.csv", Part("counted", part.folder, part.scratch, part.tiny)
    # The names of our kernels end so; torch's do not.
    command = [tool, "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:^_[a-z]+_kernel$"]
    with path.open("w", encoding="utf-8") as output:
        done = subprocess.run([*command, *command_of(inner)], stdout=output, stderr=subprocess.STDOUT, check=False)
    last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    part.add(file=path.name, status=done.returncode, **{"last_lines": last} if done.returncode else {})
