"""Step 2: the roofs, and the matrix products of a run beside the library's and beside the roofs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import cost
import torch
from bare import bare_product, operands
from cost import Cost
from gpu_lines import Part
from operations import DEVICE, GPU, UNIT, WEIGHT, assert_equal_enough, gram, normal
from timing import times
from torch import Tensor

from sparsefw.kernels import triton_ops

# (rows, d) of products: chunks of a 70B run, chunks that fill the waves of 132 multiprocessors, and an 8B layer.
PRODUCTS = [(6528, 8192), (4224, 8192), (10240, 8192), (1856, 28672), (4224, 28672), (4096, 4096), (4096, 14336)]
# Tokens and width of Gram matrices; (tokens, rows, d) of cross matrices.
GRAMS = [(4096, 4096), (4096, 8192), (16384, 8192), (4096, 14336), (4096, 28672), (16384, 28672)]
CROSSES = [(4096, 4096, 4096), (4096, 8192, 8192), (16384, 8192, 8192), (4096, 8192, 28672), (4096, 28672, 28672)]
EXACT = [(6528, 8192), (1856, 28672), (4096, 4096)]
TINY = [(48, 96), (40, 131)]

TOLERANCES = {"bf16": 2e-2, "tf32": 2e-3, "tf32x3": 1e-5, "ieee": 1e-5}
# Tensor cores cut off what a sum has no room for, and the library may sum in parts. Over 16,384 tokens that is more
# than rounding alone would be.
SUMS = 2.0**-14
# Precisions whose kernels are measured: those of runs on a GPU. The interpreter multiplies in fp32 anyway.
PRECISIONS = ("bf16", "tf32") if GPU else ("ieee",)


def roofs(part: Part) -> None:
    """Rates of a copy on the device, and of the library's products."""
    size = 1 << (16 if part.tiny else 30)
    source = torch.ones(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    measured = times(partial(target.copy_, source))
    # Read once, written once.
    part.add(roof="copy", rate=2 * size / measured.median, **measured.as_dict())
    for precision in ("bf16", "tf32", "ieee"):
        for d in (64,) if part.tiny else (8192, 16384):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            if precision == "ieee" and d > 8192:
                continue
            E, G = normal(d, d, dtype=dtype), normal(d, d, dtype=dtype, seed=1)
            measured = times(partial(bare_product, E, G, precision=precision))
            part.add(roof=precision, d=d, rate=2 * d**3 / measured.median, **measured.as_dict())


def measure(
    part: Part, run: Callable[..., object], least: Cost, *, unit: str | None, setup: Callable[[], tuple] = tuple,
    **what: Any
) -> float:  # fmt: skip
    """Time an operation, and add a line with its rates and its share of the roofs; returns seconds.

    Args:
        part: receives the line.
        run: the operation.
        least: its least flops and bytes.
        unit: the precision whose roof bounds the flops; None for operations bound by bytes.
        setup: returns fresh arguments before every round.
        what: stands in the line.
    """
    measured, known = times(run, setup), part.roofs()
    seconds = measured.median
    rates = {"tflops": least.flops / seconds / 1e12, "gbs": least.bytes / seconds / 1e9}
    share = None
    if "copy" in known and (unit is None or unit in known):
        flops = least.flops if unit else 0
        share = Cost(flops, least.bytes).seconds(known.get(unit or "", 1.0), known["copy"]) / seconds
    part.add(**what, **measured.as_dict(), **rates, share_of_roof=share)
    return seconds


def checked(part: Part, got: Tensor, expected: Tensor, tolerance: float, **what: Any) -> bool:
    """Whether a result is right. A wrong one gets a line, and no time."""
    try:
        assert_equal_enough(got, expected, tolerance)
    except AssertionError as error:
        part.add(**what, wrong=str(error).splitlines()[0])
        return False
    return True


def beside_the_library(
    part: Part, bare: Callable[[], Tensor], ours: Callable[[], Tensor], least: Cost, tolerance: float, *, unit: str,
    lower: bool = False, **what: Any
) -> None:  # fmt: skip
    """Time the library's product and the kernel, once their results (or lower triangles) have been compared."""
    library = measure(part, bare, least, unit=unit, way="bare", **what)
    got, expected = (x.tril() if lower else x for x in (ours(), bare()))
    if checked(part, got, expected, tolerance, **what):
        seconds = measure(part, ours, least, unit=unit, way="triton", **what)
        part.add(**what, speed_of_the_library=library / seconds)


def products(part: Part) -> None:
    """U = E G by the kernel and by the library, in every precision of a run."""
    for precision in PRECISIONS:
        for rows, d in TINY if part.tiny else PRODUCTS:
            E, G = operands(normal(rows, d, dtype=WEIGHT), gram(d), precision)
            out = torch.empty(rows, d, device=DEVICE)
            bare = partial(bare_product, E, G, precision=precision)
            ours = partial(triton_ops.product, E, G, precision=precision, out=out)
            least, tolerance = cost.product(rows, d, E=E.itemsize, G=G.itemsize), TOLERANCES[precision]
            what = {"operation": "product", "precision": precision, "rows": rows, "d": d}
            beside_the_library(part, bare, ours, least, tolerance, unit=precision, **what)


def grams(part: Part) -> None:
    """G += X^T X by the kernel, and the library's full square."""
    for tokens, d in [(100, d) for _, d in TINY] if part.tiny else GRAMS:
        X, G = normal(tokens, d, dtype=WEIGHT), torch.zeros(d, d, device=DEVICE)
        bare, ours = partial(bare_product, X.T, X, precision="ieee"), partial(triton_ops.gram_accumulate, G, X)
        least, what = cost.gram_accumulate(tokens, d, X=X.itemsize), {"operation": "gram", "tokens": tokens, "d": d}
        # Above the diagonal the sum is undefined until it is mirrored.
        beside_the_library(part, bare, ours, least, SUMS, unit=UNIT, lower=True, **what)


def crosses(part: Part) -> None:
    """B += D^T X by the kernel and by the library."""
    for tokens, rows, d in [(100, *shape) for shape in TINY] if part.tiny else CROSSES:
        D, X = normal(tokens, rows, dtype=WEIGHT), normal(tokens, d, dtype=WEIGHT, seed=1)
        B = torch.zeros(rows, d, device=DEVICE)
        bare, ours = partial(bare_product, D.T, X, precision="ieee"), partial(triton_ops.cross_accumulate, B, D, X)
        least = cost.cross_accumulate(tokens, rows, d, X=X.itemsize)
        what = {"operation": "cross", "tokens": tokens, "rows": rows, "d": d}
        beside_the_library(part, bare, ours, least, SUMS, unit=UNIT, **what)


def exact_products(part: Part) -> None:
    """Exact products of a bf16 weight, in products in bf16 of the same size."""
    for rows, d in TINY if part.tiny else EXACT:
        E, G = normal(rows, d, dtype=WEIGHT), gram(d)
        out = torch.empty(rows, d, device=DEVICE)
        what = {"operation": "exact product", "rows": rows, "d": d}
        least = cost.product(rows, d, E=E.itemsize, G=G.itemsize)
        exact = partial(triton_ops.product, E, G, precision="tf32x3", out=out)
        expected = bare_product(E.float(), G, precision="ieee")
        if not checked(part, exact(), expected, 1e-5, **what):
            continue
        seconds = measure(part, exact, Cost(3 * least.flops, least.bytes), unit="tf32", **what)
        low = partial(triton_ops.product, *operands(E, G, "bf16"), precision="bf16", out=out)
        fast = measure(part, low, least, unit="bf16", **what | {"operation": "the same in bf16"})
        part.add(**what, products_in_bf16=seconds / fast)
