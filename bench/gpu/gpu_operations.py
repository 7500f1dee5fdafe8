"""Time operations on a GPU, and compare them with the library or torch and with the measured roofs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import operations as made
import torch
from bare import bare_product
from gpu import Part
from operations import GPU, TINY, Operation
from timing import times

# (rows, d): chunks of a 70B run, chunks that fill the waves of 132 multiprocessors, and layers of 8B.
CHUNKS = [(6528, 8192), (1856, 28672), (4096, 4096), (4096, 14336)] if GPU else TINY
SHAPES = [*CHUNKS, (4224, 8192), (10240, 8192), (4224, 28672)] if GPU else TINY
PACKED = [(4096, 4096), (8192, 8192), (8192, 28672)] if GPU else TINY
TOKENS = (4096, 16384) if GPU else (100,)
# Precisions whose kernels are measured. The interpreter multiplies in fp32 anyway.
PRECISIONS = ("bf16", "tf32", "tf32x3") if GPU else ("ieee",)

Make = Callable[..., Operation]
# The operations of each part, with their sizes.
OPERATIONS: dict[str, list[tuple[str, Make, Sequence[Sequence[int]]]]] = {
    "products": [(f"product {name}", partial(made.product, precision=name), SHAPES) for name in PRECISIONS],
    "accumulations": [
        ("gram", made.gram_accumulate, [(tokens, d) for tokens in TOKENS for _, d in CHUNKS]),
        ("cross", made.cross_accumulate, [(tokens, *chunk) for tokens in TOKENS for chunk in CHUNKS]),
    ],
    "packed": [(f"packed product {x}", partial(made.packed_product, batch=x), PACKED) for x in (1, 4, 16, 512)],
    "row kernels": [
        ("row step", made.row_step, CHUNKS),
        ("row step of a target", partial(made.row_step, target_gap=True), CHUNKS),
        ("row step 2:4", partial(made.row_step, group=4), CHUNKS),
        ("conjugate step", made.conjugate_step, CHUNKS),
        ("lmo", made.lmo, CHUNKS),
        ("adam step", made.adam_step, CHUNKS),
    ],
}


def roofs(part: Part) -> None:
    """Measure the rates of a copy on the device, in bytes a second, and of library products, in flops a second."""
    copied = made.copy(1 << (30 if GPU else 16))
    part.add(roof="copy", rate=copied.cost.bytes / times(copied.ways["torch"]).median)
    d = 8192 if GPU else 64
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
    known = {row["roof"]: row["rate"] for row in replace(part, name="roofs").lines() if "roof" in row}
    share = None
    if "copy" in known:
        # An operation without a unit is bound by its bytes.
        roof = known[operation.unit] if operation.unit else math.inf
        share = operation.cost.seconds(roof, known["copy"]) / ours.median
    speed = before.median / ours.median
    part.add(**label, **ours.as_dict(), rival=rival, rival_ms=1e3 * before.median, speed=speed, share_of_roof=share)


def compare(part: Part) -> None:
    """Compare the operations of a part of `OPERATIONS` with their rivals."""
    for name, make, sizes in OPERATIONS[part.name]:
        for size in sizes:
            measure(part, name, make, size)
