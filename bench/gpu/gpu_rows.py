"""Step 3: row kernels at the chunks of real runs, whether their bits repeat, and what a profiler counts of them."""

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import cost
import torch
from cost import Cost
from gpu_lines import Part
from gpu_products import measure
from gpu_steps import command_of
from operations import DEVICE, WEIGHT, gram, normal, numbers, row_state
from torch import Tensor

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.definitions import RowState

# (rows, d): chunks of a 70B run, and a layer of an 8B run.
CHUNKS = [(6528, 8192), (1856, 28672), (4096, 4096), (4096, 14336)]
TINY = [(48, 96), (40, 132)]

REPEATS = 200

# Counters of Nsight Compute: bytes from and to the memory, and the share of accesses that the L2 cache serves.
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_sector_hit_rate.pct")
# Launches of one kernel that are counted.
COUNTED = 3

# An operation: a function of fresh arguments, what makes them, and its least cost.
Operation = tuple[Callable[..., object], Callable[[], tuple], Cost]


def step(rows: int, d: int, *, target_gap: bool = False, group: int = 0) -> Operation:
    """A Frank-Wolfe step of bf16 weights, or of fp32 weights with a gap to their target."""
    W = normal(rows, d, dtype=torch.float32 if target_gap else WEIGHT)
    gap = 0.1 * normal(rows, d, seed=5) if target_gap else None
    k = 2 if group else int(0.4 * d)
    # A diagonal of ones is as good as any here.
    diag = torch.ones(d, device=DEVICE)
    V, warm = (cpu.lmo(normal(rows, d, seed=seed), k, group=group) for seed in (1, 2))
    R, U = normal(rows, d, seed=3), normal(rows, d, seed=4)
    thetas = numbers("triton", theta=0.5, next_theta=0.6)

    def fresh() -> tuple:
        # The step works in place: every call starts from the same state.
        E = torch.empty(rows, d, dtype=WEIGHT, device=DEVICE)
        matrices = warm.float(), R.clone(), U.clone(), V.clone(), E
        return (row_state(W, diag, *matrices, k, group=group, target_gap=gap),)

    def run(state: RowState) -> tuple[Tensor, ...]:
        triton_ops.row_step(state, **thetas)
        return state.eta, state.error, state.M, state.R, state.V, state.E

    return run, fresh, cost.row_step(rows, d, W=W.itemsize, E=WEIGHT.itemsize, target_gap=target_gap)


def conjugate(rows: int, d: int) -> Operation:
    """A step of conjugate gradients without its product."""
    mask, inverse = normal(rows, d, seed=3) > 0, normal(d, seed=4).abs() + 1
    Z, R, U = (normal(rows, d, seed=seed) for seed in range(3))
    P = normal(rows, d, seed=6, dtype=WEIGHT)

    def fresh() -> tuple:
        rz = torch.ones(rows, device=DEVICE)
        return Z.clone(), R.clone(), P.clone(), U, rz, 1e-12 * rz, inverse

    def run(*state: Tensor) -> tuple[Tensor, ...]:
        triton_ops.conjugate_step(*state, mask=mask)
        return state[:3]

    return run, fresh, cost.conjugate_step(rows, d, P=P.itemsize)


def lmo(rows: int, d: int) -> Operation:
    """The k best scores of every row."""
    score = normal(rows, d)
    # As in a solve: a check for NaN would wait for the GPU, and the wait would be timed.
    return partial(triton_ops.lmo, score, int(0.4 * d), checked=False), tuple, cost.lmo(rows, d)


OPERATIONS: dict[str, Callable[[int, int], Operation]] = {
    "row step": step,
    "row step, fp32 with a gap to the target": partial(step, target_gap=True),
    "row step, 2:4": partial(step, group=4),
    "conjugate step": conjugate,
    "lmo": lmo,
}


def product(rows: int, d: int) -> Operation:
    """A product of a step."""
    E, G = normal(rows, d, dtype=WEIGHT), gram(d).to(WEIGHT)
    precision = "bf16" if torch.bfloat16 == WEIGHT else "ieee"
    least = cost.product(rows, d, E=E.itemsize, G=G.itemsize)
    return partial(triton_ops.product, E, G, precision=precision), tuple, least


def gram_matrix(rows: int, d: int) -> Operation:
    """A Gram matrix of as many tokens as there are rows."""
    X = normal(rows, d, dtype=WEIGHT)
    fresh = partial(torch.zeros, d, d, device=DEVICE)
    return lambda G: triton_ops.gram_accumulate(G, X), lambda: (fresh(),), cost.gram_accumulate(rows, d, X=X.itemsize)


REPEATED = OPERATIONS | {"product": product, "gram": gram_matrix}


def row_kernels(part: Part) -> None:
    """Times of the row kernels, and their share of the bandwidth of a copy."""
    for name, make in OPERATIONS.items():
        for rows, d in TINY if part.tiny else CHUNKS:
            run, fresh, least = make(rows, d)
            measure(part, run, least, unit=None, setup=fresh, operation=name, rows=rows, d=d)


def repeats(part: Part) -> None:
    """Every operation again and again from one state; all results must have the same bits."""
    count = 3 if part.tiny else REPEATS
    for name, make in REPEATED.items():
        for rows, d in TINY[:1] if part.tiny else CHUNKS[:2]:
            run, fresh, _ = make(rows, d)
            part.add(operation=name, rows=rows, d=d, **differing(run, fresh, count))


def differing(run: Callable[..., Any], fresh: Callable[[], tuple], count: int) -> dict[str, int]:
    """How many of so many runs gave other bits than the first, and how many entries differed at most."""

    def bits() -> list[Tensor]:
        # Compared as integers: NaN equals NaN, and -0.0 differs from 0.0.
        result = run(*fresh())
        tensors = [result] if isinstance(result, Tensor) else result
        return [x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize]).clone() for x in tensors]

    first, wrong, most = bits(), 0, 0
    for _ in range(count - 1):
        entries = sum(int((a != b).sum()) for a, b in zip(bits(), first, strict=True))
        wrong, most = wrong + bool(entries), max(most, entries)
    return {"repeats": count, "runs_that_differ": wrong, "most_entries_that_differ": most}


def counted(part: Part) -> None:
    """A few launches of every row kernel and of the product, for the profiler that runs this process."""
    for name, make in REPEATED.items():
        for rows, d in TINY[:1] if part.tiny else CHUNKS[:2]:
            run, fresh, least = make(rows, d)
            for _ in range(COUNTED):
                run(*fresh())
            print(f"{name}, {rows} x {d}: at least {least.bytes / 1e6:.1f} MB", flush=True)


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
