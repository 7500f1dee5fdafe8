"""Compile every kernel for every GPU target, without a GPU: `python bench/compiled.py`.

Each launcher is called with tensors on the meta device and a stub in place of the driver. So it compiles what a launch
would compile: the configuration for the shape, and the specialisation of every argument. A row of the table has the
registers of a thread, bytes of stack and of shared memory, instructions that load or store spilled registers,
tensor-core and bulk-copy instructions, and the least cost of the operation (`kernels/cost.py`). With --tflops and
--bandwidth, the roofs of a card, a row also has the time that they imply.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from sparsefw.kernels import cost
from sparsefw.kernels.bound import bound_scores, bound_sums
from sparsefw.kernels.candidates import candidates
from sparsefw.kernels.conjugate import conjugate_step
from sparsefw.kernels.cost import Cost
from sparsefw.kernels.cross import cross_accumulate
from sparsefw.kernels.gradient import gradient
from sparsefw.kernels.gram import gram_accumulate
from sparsefw.kernels.lmo import lmo
from sparsefw.kernels.mirror import mirror_lower
from sparsefw.kernels.product import product
from sparsefw.kernels.removed import begin_fit, removed
from sparsefw.kernels.rounding import rounding_order
from sparsefw.kernels.rows import row_errors, take_rows
from sparsefw.kernels.step import row_step
from sparsefw.kernels.swaps import row_swaps
from sparsefw.kernels.update import convex_update

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# mma.sync is Ampere's, wgmma Hopper's and tcgen05 Blackwell's. No name contains another.
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
BULK_COPY = "cp.async.bulk.tensor"

ROWS, TOKENS, SWAPS = 4096, 2048, 100
RESULTS = Path(__file__).with_name("results") / "compiled.json"


@dataclass(frozen=True)
class Case:
    """One launch: its name, the targets it is compiled for, and its least cost."""

    name: str
    targets: tuple[str, ...]
    launch: Callable[[], object]
    cost: Cost


class StubDriver:
    """The part of a driver that compiling needs."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled(Exception):
    """Raised in a launcher in place of the launch; carries the compiled kernel."""

    def __init__(self, kernel, options: dict):
        self.kernel = kernel
        self.options = options


def compile_launch(target: str, launch: Callable[[], object]) -> dict:
    """What `launch` would run on `target`: configuration, registers, stack and shared memory in bytes, instructions."""
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        # The keys of this cache hold the device's number only, so it would return the binary of the last target.
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        raise Compiled(kernel, {k: v for k, v in kwargs.items() if k.startswith("BLOCK_") or k == "SEARCH_D"})

    triton.runtime.driver.set_active(StubDriver(TARGETS[target]))
    triton.JITFunction.run = compile_only
    try:
        launch()
    except Compiled as compiled:
        kernel, options = compiled.kernel, compiled.options
    finally:
        triton.JITFunction.run = run
    code = kernel.asm["amdgcn"] if target == "gfx942" else kernel.asm["ptx"]
    return dict(
        target=target,
        config=" ".join(f"{key}={value}" for key, value in options.items()),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        tensor_cores=[name for name in TENSOR_CORES if name in code],
        bulk_copies=BULK_COPY in code,
        **(_amd_usage(code) if target == "gfx942" else _nvidia_usage(kernel.asm["cubin"])),
    )


def _nvidia_usage(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        stack = int(usage["STACK"]) + int(usage["LOCAL"])
        # ptxas may reserve bytes that no instruction touches, so loads and stores of local memory are counted.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("--dump-sass"))) if stack else 0
    return dict(registers=int(usage["REG"]), stack=stack, spills=spills)


def _amd_usage(code: str) -> dict:
    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    # Spilled scalar registers do not count: they go to lanes of vector registers, not to memory.
    stack = read("private_segment_fixed_size")
    return dict(registers=read("vgpr_count"), stack=stack, spills=read("vgpr_spill_count"))


def empty(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


ALL, NVIDIA, BULK, HOPPER = tuple(TARGETS), ("sm_80", "sm_90", "sm_100"), ("sm_90", "sm_100"), ("sm_90",)
BF16, FP32 = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    """Launches of realistic shapes, with each configuration of each kernel at least once."""
    yield from _products()
    yield from _accumulations()
    for d, targets in ((576, HOPPER), (4096, ALL), (8192, HOPPER), (14336, ALL), (28672, ALL), (65536, ALL)):
        yield _lmo(str(d), targets, d, d // 2, fixed=True, positive=True)
        yield _step(str(d), targets, d, d // 2)
    for n, m in ((2, 4), (16, 32)):
        yield _lmo(f"{n}:{m} 4096", ALL, 4096, n, group=m)
        yield _step(f"{n}:{m} 4096", HOPPER, 4096, n, group=m)
        yield _step(f"{n}:{m} 14336", ALL, 14336, n, group=m)
    yield _step("of a target 4096", HOPPER, 4096, 2048, target_gap=True)
    yield _step("of a target 28672", HOPPER, 28672, 14336, target_gap=True)
    yield _step("3:5 4095", HOPPER, 4095, 3, group=5)
    yield _step("open loop 4096", HOPPER, 4096, empty(ROWS, 1, torch.int32)[:, 0], fixed=False, open_loop=True)
    for d, targets in ((576, HOPPER), (4096, ALL), (28672, ALL)):
        yield _swaps(str(d), targets, d)
    for m, d in ((4, 4096), (32, 14336), (5, 4095)):
        yield _swaps(f"of {m} {d}", ALL, d, group=m, fixed=m == 4)
    yield _conjugate("576", NVIDIA, 576)
    yield _conjugate("1536", NVIDIA, 1536)
    yield _conjugate("8192", HOPPER, 8192)
    for d in (4096, 28672):
        yield _conjugate(str(d), ALL, d)
        for place in ("first", "last"):
            yield _conjugate(f"{place} {d}", HOPPER, d, **{place: True})
    yield _conjugate("target 4096", HOPPER, 4096, mask=False)
    for d in (4096, 28672):
        yield _conjugate(f"fp32 {d}", HOPPER, d, P=FP32)
    G = empty(4096, 4096)
    yield Case("mirror 4096", ALL, lambda: mirror_lower(G), cost.mirror_lower(4096))
    for d, targets in ((576, HOPPER), (4096, ALL), (28672, HOPPER)):
        yield from _fits(str(d), targets, d)
    x, v, eta = empty(ROWS, 4096), empty(ROWS, 4096, torch.bool), empty(ROWS, 1)[:, 0]
    yield Case("update 4096", ALL, lambda: convex_update(x, v, x, x, eta), cost.convex_update(ROWS, 4096))


def _products() -> Iterator[Case]:
    for text, targets, rows, d, E, G, precision in (
        ("bf16", ALL, 4096, 4096, BF16, BF16, "bf16"),
        ("tf32", ALL, 4096, 4096, FP32, FP32, "tf32"),
        ("bf16", HOPPER, 576, 576, BF16, BF16, "bf16"),
        ("tf32", HOPPER, 576, 576, FP32, FP32, "tf32"),
        ("ieee", NVIDIA, 4096, 4096, FP32, FP32, "ieee"),
        ("bf16", HOPPER, 8192, 28672, BF16, BF16, "bf16"),
        # A solve has no such operands, but any caller may.
        ("of fp32 and bf16", ALL, 4096, 4096, FP32, BF16, "bf16"),
        ("of fp32", HOPPER, 4096, 4096, FP32, FP32, "bf16"),
        ("tf32x3", ALL, 4096, 4096, FP32, FP32, "tf32x3"),
        ("tf32x3 of bf16", HOPPER, 4096, 14336, BF16, FP32, "tf32x3"),
        ("tf32x3", HOPPER, 576, 576, FP32, FP32, "tf32x3"),
        # Operands of a bf16 weight and an fp32 Gram matrix.
        ("mixed", HOPPER, 4096, 14336, BF16, FP32, "tf32"),
    ):
        operands = empty(rows, d, E), empty(d, d, G)
        yield Case(
            f"product {text} {rows}x{d}",
            targets,
            lambda operands=operands, precision=precision: product(*operands, precision=precision),
            cost.product(rows, d, E=E.itemsize, G=G.itemsize),
        )
    for rows, d, targets in ((4096, 4096, ALL), (8192, 28672, HOPPER), (576, 576, HOPPER)):
        operands, out = (empty(rows, d, BF16), empty(d, d, BF16)), empty(rows, d)
        least = cost.product(rows, d, E=2, G=2)
        yield Case(
            f"product added {rows}x{d}",
            targets,
            lambda operands=operands, out=out: product(*operands, precision="bf16", out=out, add=True),
            Cost(least.flops, least.bytes + 4 * rows * d),
        )
    for precision, dtype in (("bf16", BF16), ("tf32", FP32), ("tf32x3", FP32)):
        operands = empty(4096, 4096, BF16), empty(4096, 4096), empty(4096, 4096, dtype)
        yield Case(
            f"gradient {precision} 4096x4096",
            ALL,
            lambda operands=operands, precision=precision: gradient(*operands, precision=precision),
            cost.gradient(4096, 4096, W=2, G=dtype.itemsize),
        )


def _accumulations() -> Iterator[Case]:
    for text, targets, d, dtype, precision in (
        ("bf16", HOPPER, 576, BF16, "ieee"),
        ("bf16", ALL, 4096, BF16, "ieee"),
        ("bf16", BULK, 14336, BF16, "ieee"),
        ("fp16", HOPPER, 28672, torch.float16, "ieee"),
        # Rows are not aligned for bulk copies.
        ("bf16", BULK, 4100, BF16, "ieee"),
        ("tf32", NVIDIA, 4096, FP32, "tf32"),
    ):
        G, X = empty(d, d), empty(TOKENS, d, dtype)
        yield Case(
            f"gram {text} {d}",
            targets,
            lambda G=G, X=X, precision=precision: gram_accumulate(G, X, precision=precision),
            cost.gram_accumulate(TOKENS, d, X=dtype.itemsize),
        )
    for text, targets, rows, d, dtype, precision in (
        ("bf16", HOPPER, 1536, 576, BF16, "ieee"),
        ("bf16", ALL, 4096, 4096, BF16, "ieee"),
        ("bf16", HOPPER, 4096, 14336, BF16, "ieee"),
        ("fp16", HOPPER, 8192, 28672, torch.float16, "ieee"),
        ("bf16", BULK, 4100, 4100, BF16, "ieee"),
        ("tf32", NVIDIA, 4096, 4096, FP32, "tf32"),
        ("ieee", NVIDIA, 576, 576, FP32, "ieee"),
    ):
        operands = empty(rows, d), empty(TOKENS, rows, dtype), empty(TOKENS, d, dtype)
        yield Case(
            f"cross {text} {rows}x{d}",
            targets,
            lambda operands=operands, precision=precision: cross_accumulate(*operands, precision=precision),
            cost.cross_accumulate(TOKENS, rows, d, X=dtype.itemsize),
        )


def _lmo(text: str, targets: tuple[str, ...], d: int, k: int, *, fixed: bool = False, **options) -> Case:
    score, fixed_entries = empty(ROWS, d), empty(ROWS, d, torch.bool) if fixed else None
    return Case(
        f"lmo {text}", targets, lambda: lmo(score, k, fixed=fixed_entries, **options), cost.lmo(ROWS, d, fixed=fixed)
    )


def _step(
    text: str, targets: tuple[str, ...], d: int, k: int | Tensor, *, fixed: bool = True, target_gap: bool = False,
    open_loop: bool = False, **options
) -> Case:  # fmt: skip
    """A step of bf16 weights, or with `target_gap` of fp32 candidates without fixed entries; products are in bf16.

    Without `open_loop` the search for the vertex starts from a threshold.
    """
    W, state, V = empty(ROWS, d, FP32 if target_gap else BF16), empty(ROWS, d), empty(ROWS, d, torch.bool)
    E, number = empty(ROWS, d, BF16), empty(1, 1)[0, 0]
    fixed = fixed and not target_gap
    options |= {"theta": number, "next_theta": number} | ({"eta": number} if open_loop else {})
    options |= {"fixed": V if fixed else None, "target_gap": state if target_gap else None}
    options |= {"threshold": None if open_loop else state[:, 0].contiguous()}
    return Case(
        f"step {text}",
        targets,
        lambda: row_step(W, state[0], state, state, state, V, E, k, **options),
        cost.row_step(ROWS, d, W=W.itemsize, E=2, fixed=fixed, target_gap=target_gap),
    )


def _swaps(text: str, targets: tuple[str, ...], d: int, *, group: int = 0, fixed: bool = True) -> Case:
    W, G, R, V = empty(ROWS, d, BF16), empty(d, d), empty(ROWS, d), empty(ROWS, d, torch.bool)
    fixed_entries = V if fixed else None
    return Case(
        f"swaps {text}",
        targets,
        lambda: row_swaps(W, G, R, V, SWAPS, group=group, fixed=fixed_entries),
        cost.row_swaps(ROWS, d, SWAPS, W=2),
    )


def _conjugate(
    text: str, targets: tuple[str, ...], d: int, *, P: torch.dtype = BF16, mask: bool = True, **place: bool
) -> Case:
    state, (rz, inverse) = empty(ROWS, d), (empty(n, 1)[:, 0] for n in (ROWS, d))
    direction = empty(ROWS, d, P)
    mask_entries = empty(ROWS, d, torch.bool) if mask else None
    return Case(
        f"conjugate {text}",
        targets,
        lambda: conjugate_step(state, state, direction, state, rz, rz, inverse, mask=mask_entries, **place),
        cost.conjugate_step(ROWS, d, P=P.itemsize, mask=mask, **place),
    )


def _fits(text: str, targets: tuple[str, ...], d: int) -> Iterator[Case]:
    """What refits, rounds and errors do besides products and steps, for bf16 weights and products in bf16."""
    W, x, V = empty(ROWS, d, BF16), empty(ROWS, d), empty(ROWS, d, torch.bool)
    of_rows, of_columns, taken = empty(ROWS, 1)[:, 0], empty(d, 1)[:, 0], empty(ROWS, 1, torch.bool)[:, 0]
    for name, launch, least in (
        ("removed", lambda: removed(W, V), cost.removed(ROWS, d, W=2, E=2)),
        ("removed of a target", lambda: removed(W, V, x), cost.removed(ROWS, d, W=2, E=4, target_gap=True)),
        ("begin_fit", lambda: begin_fit(W, x, V, dtype=BF16), cost.begin_fit(ROWS, d, W=2, start=4, E=2)),
        ("row_errors", lambda: row_errors(W, x), cost.row_errors(ROWS, d, W=2)),
        ("row_errors of a fit", lambda: row_errors(W, x, x), cost.row_errors(ROWS, d, W=2, Z=4)),
        ("take_rows", lambda: take_rows(x, x, taken), cost.take_rows(ROWS, d, X=4)),
        ("take_rows of a mask", lambda: take_rows(V, V, taken), cost.take_rows(ROWS, d, X=1)),
        (
            "candidates",
            lambda: candidates(x, x, V, of_columns, of_columns, margin=of_rows, support=V),
            cost.candidates(ROWS, d, support=True),
        ),
        (
            "bound_scores",
            lambda: bound_scores(W, x, x, target_gap=x, damping=of_columns),
            cost.bound_scores(ROWS, d, W=2, target_gap=True, damping=True),
        ),
        ("bound_sums", lambda: bound_sums(x, x, V), cost.bound_sums(ROWS, d)),
        # The second of the three launches of round_mask.
        ("rounding", lambda: rounding_order(x, V, x), Cost(3 * ROWS * d, 13 * ROWS * d)),
    ):
        yield Case(f"{name} {text}", targets, launch, least)


def compile_all(pattern: str = "") -> Iterator[dict]:
    """A row of the table for every target of every case whose name contains `pattern`."""
    for case in cases():
        for target in case.targets:
            if pattern in case.name:
                known = dict(name=case.name, target=target, flops=case.cost.flops, bytes=case.cost.bytes)
                yield known | compile_launch(target, case.launch)


def table(rows: list[dict], roofs: tuple[float, float] | None = None) -> str:
    """The table in Markdown. `roofs`, in flops and bytes per second, add a column with the time that they imply."""
    head = ["launch", "target", "tile", "warps", "stages", "registers", "stack", "spills", "shared", "instructions"]
    head += ["Gflop", "MB"] + (["ms"] if roofs else [])
    lines = [head, ["---"] * len(head)]
    for row in rows:
        instructions = row["tensor_cores"] + [BULK_COPY] * row["bulk_copies"]
        line = [row[name] for name in ("name", "target", "config", "warps", "stages", "registers", "stack", "spills")]
        line += [row["shared"], " ".join(instructions), f"{row['flops'] / 1e9:.1f}", f"{row['bytes'] / 1e6:.0f}"]
        line += [f"{1e3 * Cost(row['flops'], row['bytes']).seconds(*roofs):.3f}"] if roofs else []
        lines.append(line)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Compile, or read the committed rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="launches whose name contains this")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write the rows there (committed: {RESULTS.parent.name}/{RESULTS.name})",
    )
    add("--table", action="store_true", help="compile nothing, print what is committed")
    add("--tflops", type=float, help="roof of arithmetic, measured, in Tflop/s")
    add("--bandwidth", type=float, help="roof of memory, measured, in GB/s")
    arguments = parser.parse_args(argv)
    if (arguments.tflops is None) != (arguments.bandwidth is None):
        parser.error("--tflops and --bandwidth belong together")
    if triton.knobs.runtime.interpret and not arguments.table:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if arguments.table:
        rows = [row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if arguments.only in row["name"]]
    else:
        rows = list(compile_all(arguments.only))
    if arguments.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        content = f'{{\n "triton": "{triton.__version__}",\n "rows": [\n{lines}\n ]\n}}\n'
        arguments.json.write_text(content, encoding="utf-8")
    roofs = (arguments.tflops * 1e12, arguments.bandwidth * 1e9) if arguments.tflops else None
    print(table(rows, roofs))


if __name__ == "__main__":
    main()
