"""Time operations on a GPU, and compare them with the library or torch and with the measured roofs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import operations as made
import torch
from bare import bare_product
from gpu import Part
from operations import GPU, TINY, Cost, Operation
from timing import times

# (rows, d): chunks of a 70B run, chunks that fill the waves of 132 multiprocessors, and layers of 8B.
SHAPES = [(6528, 8192), (4224, 8192), (10240, 8192), (1856, 28672), (4224, 28672), (4096, 4096), (4096, 14336)]
CHUNKS = [(6528, 8192), (1856, 28672), (4096, 4096), (4096, 14336)]
PACKED = [(4096, 4096), (8192, 8192), (8192, 28672)]
TOKENS = (4096, 16384)
REPEATS = 200
# Precisions whose kernels are measured. The interpreter multiplies in fp32 anyway.
PRECISIONS = ("bf16", "tf32", "tf32x3") if GPU else ("ieee",)

Make = Callable[..., Operation]
ROW_KERNELS: dict[str, Make] = {
    "row step": made.row_step,
    "row step of a target": partial(made.row_step, target_gap=True),
    "row step 2:4": partial(made.row_step, group=4),
    "conjugate step": made.conjugate_step,
    "lmo": made.lmo,
    "adam step": made.adam_step,
}


def roofs(part: Part) -> None:
    """Measure the rates of a copy on the device, in bytes a second, and of library products, in flops a second."""
    copied = made.copy(1 << (16 if part.tiny else 30))
    part.add(roof="copy", rate=copied.cost.bytes / times(copied.ways["torch"]).median)
    d = 64 if part.tiny else 8192
    for precision in ("bf16", "tf32", "ieee"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        E, G = made.normal(d, d, dtype=dtype), made.normal(d, d, dtype=dtype, seed=1)
        seconds = times(partial(bare_product, E, G, precision=precision)).median
        part.add(roof=precision, rate=2 * d**3 / seconds)


def measure(part: Part, name: str, make: Make, size: Sequence[int]) -> None:
    """Time an operation at one size, and its rival; a result that differs from the rival's gets a line and no time."""
    operation = make(*size)
    rival = "bare" if "bare" in operation.ways else "torch"
    label: dict[str, Any] = {"operation": name, "size": list(size)}
    before = times(operation.ways[rival], operation.fresh)
    try:
        operation.check(operation.result("triton"), operation.result(rival))
    except AssertionError as error:
        part.add(**label, wrong=str(error).splitlines()[0])
        return
    ours = times(operation.ways["triton"], operation.fresh)
    known = {
        row["roof"]: row["rate"] for row in Part("roofs", part.folder, part.scratch, part.tiny).lines() if "roof" in row
    }
    share = None
    if "copy" in known:
        flops = operation.cost.flops if operation.unit else 0
        least = Cost(flops, operation.cost.bytes).seconds(known.get(operation.unit or "", 1.0), known["copy"])
        share = least / ours.median
    speed = before.median / ours.median
    part.add(**label, **ours.as_dict(), rival=rival, rival_ms=1e3 * before.median, speed=speed, share_of_roof=share)


def products(part: Part) -> None:
    """Compare U = E G with the library's product, at every precision."""
    for precision in PRECISIONS:
        for shape in TINY if part.tiny else SHAPES:
            measure(part, f"product {precision}", partial(made.product, precision=precision), shape)


def accumulations(part: Part) -> None:
    """Compare G += X^T X with the library's full square, and B += D^T X with the library's product."""
    for tokens in (100,) if part.tiny else TOKENS:
        for rows, d in TINY if part.tiny else CHUNKS:
            measure(part, "gram", made.gram_accumulate, (tokens, d))
            measure(part, "cross", made.cross_accumulate, (tokens, rows, d))


def packed(part: Part) -> None:
    """Compare y = x W^T of packed matrices with the library's product of dense ones."""
    for batch in (16,) if part.tiny else (1, 4, 16, 512):
        for shape in TINY if part.tiny else PACKED:
            measure(part, f"packed product {batch}", partial(made.packed_product, batch=batch), shape)


def row_kernels(part: Part) -> None:
    """Measure the operations that are bound by bytes."""
    for name, make in ROW_KERNELS.items():
        for shape in TINY if part.tiny else CHUNKS:
            measure(part, name, make, shape)


def repeats(part: Part) -> None:
    """Count the results of each operation that have other bits than the first one, from the same state."""
    count = 3 if part.tiny else REPEATS
    # The Gram matrix is of as many tokens as there are rows.
    for name, make in (ROW_KERNELS | {"product": made.product, "gram": made.gram_accumulate}).items():
        for shape in TINY[:1] if part.tiny else CHUNKS[:2]:
            operation = make(*shape)
            first = bits(operation)
            others = sum(not all(map(torch.equal, bits(operation), first)) for _ in range(count - 1))
            part.add(operation=name, size=list(shape), repeats=count, differ=others)


def bits(operation: Operation) -> list[torch.Tensor]:
    """Compute the result of the kernel, as integers: NaN equals NaN, and -0.0 differs from 0.0."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [x.view(whole[x.itemsize]) for x in operation.result("triton")]
