"""Steps 1 and 3: the roofs, and the matrix products of a run beside the library's and beside the roofs."""

from functools import partial
from typing import Any

import torch
from bare import bare_product
from gpu_lines import Part
from operations import (
    GPU,
    TINY,
    Cost,
    Operation,
    copy,
    cross_accumulate,
    gram_accumulate,
    normal,
    packed_product,
    product,
)
from timing import times

# (rows, d) of products: chunks of a 70B run, chunks that fill the waves of 132 multiprocessors, and an 8B layer.
PRODUCTS = [(6528, 8192), (4224, 8192), (10240, 8192), (1856, 28672), (4224, 28672), (4096, 4096), (4096, 14336)]
# Tokens and width of Gram matrices; (tokens, rows, d) of cross matrices.
GRAMS = [(4096, 4096), (4096, 8192), (16384, 8192), (4096, 14336), (4096, 28672), (16384, 28672)]
CROSSES = [(4096, 4096, 4096), (4096, 8192, 8192), (16384, 8192, 8192), (4096, 8192, 28672), (4096, 28672, 28672)]
EXACT = [(6528, 8192), (1856, 28672), (4096, 4096)]
# Matrices of 8B and 70B, and rows of x that a packed matrix multiplies.
PACKED, BATCHES = [(4096, 4096), (8192, 8192), (8192, 28672)], (1, 4, 16, 512)

# Precisions whose kernels are measured: those of runs on a GPU. The interpreter multiplies in fp32 anyway.
PRECISIONS = ("bf16", "tf32") if GPU else ("ieee",)


def roofs(part: Part) -> None:
    """Rates of a copy on the device, and of the library's products."""
    copied = copy(1 << (16 if part.tiny else 30))
    measured = times(copied.ways["torch"])
    part.add(roof="copy", rate=copied.cost.bytes / measured.median, **measured.as_dict())
    for precision, sizes in {"bf16": (8192, 16384), "tf32": (8192, 16384), "ieee": (8192,)}.items():
        for d in (64,) if part.tiny else sizes:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            E, G = normal(d, d, dtype=dtype), normal(d, d, dtype=dtype, seed=1)
            measured = times(partial(bare_product, E, G, precision=precision))
            part.add(roof=precision, d=d, rate=2 * d**3 / measured.median, **measured.as_dict())


def measure(part: Part, timed: Operation, way: str, **labels: Any) -> float:
    """Time a way of an operation, and add a line with its rates and its share of the roofs; returns seconds."""
    measured, known, least = times(timed.ways[way], timed.fresh), part.roofs(), timed.cost
    seconds, unit = measured.median, timed.unit
    rates = {"tflops": least.flops / seconds / 1e12, "gbs": least.bytes / seconds / 1e9}
    share = None
    if "copy" in known and (unit is None or unit in known):
        flops = least.flops if unit else 0
        share = Cost(flops, least.bytes).seconds(known.get(unit or "", 1.0), known["copy"]) / seconds
    part.add(**labels, way=way, **measured.as_dict(), **rates, share_of_roof=share)
    return seconds


def beside_the_library(part: Part, timed: Operation, **labels: Any) -> float | None:
    """Time the library's product and the kernel; returns the kernel's seconds.

    A result that differs from the library's gets a line, and no time.
    """
    library = measure(part, timed, "bare", **labels)
    try:
        timed.check(timed.result("triton"), timed.result("bare"))
    except AssertionError as error:
        part.add(**labels, wrong=str(error).splitlines()[0])
        return None
    seconds = measure(part, timed, "triton", **labels)
    part.add(**labels, speed_of_the_library=library / seconds)
    return seconds


def products(part: Part) -> None:
    """U = E G by the kernel and by the library, in every precision of a run."""
    for precision in PRECISIONS:
        for rows, d in TINY if part.tiny else PRODUCTS:
            made = product(rows, d, precision=precision)
            beside_the_library(part, made, operation="product", precision=precision, rows=rows, d=d)


def grams(part: Part) -> None:
    """G += X^T X by the kernel, and the library's full square."""
    for tokens, d in [(100, d) for _, d in TINY] if part.tiny else GRAMS:
        beside_the_library(part, gram_accumulate(tokens, d), operation="gram", tokens=tokens, d=d)


def crosses(part: Part) -> None:
    """B += D^T X by the kernel and by the library."""
    for tokens, rows, d in [(100, *shape) for shape in TINY] if part.tiny else CROSSES:
        made = cross_accumulate(tokens, rows, d)
        beside_the_library(part, made, operation="cross", tokens=tokens, rows=rows, d=d)


def exact_products(part: Part) -> None:
    """Exact products of a bf16 weight, in products in bf16 of the same size."""
    for rows, d in TINY if part.tiny else EXACT:
        labels = {"operation": "exact product", "rows": rows, "d": d}
        seconds = beside_the_library(part, product(rows, d, precision="tf32x3"), **labels)
        if seconds:
            low = measure(part, product(rows, d, precision="bf16"), "triton", **labels | {"operation": "in bf16"})
            part.add(**labels, products_in_bf16=seconds / low)


def packed(part: Part) -> None:
    """y = x W^T of packed matrices by the kernel, and the library's product of dense ones."""
    for rows, d in TINY if part.tiny else PACKED:
        for batch in (16,) if part.tiny else BATCHES:
            labels = {"operation": "packed product", "rows": rows, "d": d, "batch": batch}
            beside_the_library(part, packed_product(rows, d, batch=batch), **labels)
