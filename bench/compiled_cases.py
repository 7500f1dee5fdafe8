"""List the launches that compiled.py compiles: realistic shapes, each configuration of each kernel at least once."""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsefw.kernels import triton_ops
from sparsefw.kernels.definitions import RowState
from sparsefw.kernels.rounding import rounding_order

ROWS, TOKENS, SWAPS = 4096, 2048, 100


@dataclass(frozen=True)
class Case:
    """One launch: its name, and the targets it is compiled for."""

    name: str
    targets: tuple[str, ...]
    launch: partial


def operations(case: Case) -> list[str]:
    """List the operations in the file of a case's kernel, by the names that users import."""
    return [name for name, f in vars(triton_ops).items() if getattr(f, "__module__", "") == case.launch.func.__module__]


def select(text: str) -> list[Case]:
    """Find cases by a text in their name, by their file or operation, or else by a file that their file imports.

    Raises:
        SystemExit: there is no such case.
    """
    every, names, imported = list(cases()), {}, {}
    for case in every:
        module = sys.modules[case.launch.func.__module__]
        names[case] = [case.name, module.__name__.rpartition(".")[2], *operations(case)]
        imported[case] = re.findall(r"^from \.(\w+) import", inspect.getsource(module), re.MULTILINE)
    chosen = [case for case in every if text in names[case][0] or text in names[case]]
    if chosen := chosen or [case for case in every if text in imported[case]]:
        return chosen
    known = sorted({name for case in every for name in (*names[case][1:], *imported[case])})
    sys.exit(f"{text}: no launch, no operation and no file of kernels/; there are {', '.join(known)}")


def empty(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


ALL, NVIDIA = ("sm_80", "sm_90", "sm_100", "gfx942"), ("sm_80", "sm_90", "sm_100")
BULK, HOPPER = ("sm_90", "sm_100"), ("sm_90",)
BF16, FP32 = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    """Yield launches of realistic shapes, with each configuration of each kernel at least once."""
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
    yield _step("open loop 3:5 320", ALL, 320, 3, group=5, open_loop=True)
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
    for dtype, index in ((BF16, torch.int32), (torch.float16, torch.int32), (FP32, torch.int32), (BF16, torch.int64)):
        yield _adam(dtype, index)
    yield from _packed()
    G = empty(4096, 4096)
    yield Case("mirror 4096", ALL, partial(triton_ops.mirror_lower, G))
    for d, targets in ((576, HOPPER), (4096, ALL), (28672, HOPPER)):
        yield from _fits(str(d), targets, d)


def _products() -> Iterator[Case]:
    for text, targets, rows, d, E, G, precision in (
        ("bf16", ALL, 4096, 4096, BF16, BF16, "bf16"),
        ("tf32", ALL, 4096, 4096, FP32, FP32, "tf32"),
        ("bf16", HOPPER, 576, 576, BF16, BF16, "bf16"),
        ("tf32", HOPPER, 576, 576, FP32, FP32, "tf32"),
        ("ieee", NVIDIA, 4096, 4096, FP32, FP32, "ieee"),
        ("bf16", HOPPER, 8192, 28672, BF16, BF16, "bf16"),
        # A solve does not have these operands, but any caller may.
        ("of fp32 and bf16", ALL, 4096, 4096, FP32, BF16, "bf16"),
        ("of fp32", ALL, 4096, 4096, FP32, FP32, "bf16"),
        ("of fp32", NVIDIA, 576, 576, FP32, FP32, "bf16"),
        ("tf32x3", ALL, 4096, 4096, FP32, FP32, "tf32x3"),
        ("tf32x3 of bf16", HOPPER, 4096, 14336, BF16, FP32, "tf32x3"),
        ("tf32x3", HOPPER, 576, 576, FP32, FP32, "tf32x3"),
        # Rows are not aligned for bulk copies.
        ("bf16", NVIDIA, 4096, 4100, BF16, BF16, "bf16"),
        ("tf32x3", NVIDIA, 4096, 4100, FP32, FP32, "tf32x3"),
        # Operands of a bf16 weight and an fp32 Gram matrix.
        ("mixed", HOPPER, 4096, 14336, BF16, FP32, "tf32"),
    ):
        launch = partial(triton_ops.product, empty(rows, d, E), empty(d, d, G), precision=precision)
        yield Case(f"product {text} {rows}x{d}", targets, launch)
    for rows, d, targets in ((4096, 4096, ALL), (8192, 28672, HOPPER), (576, 576, HOPPER)):
        operands, out = (empty(rows, d, BF16), empty(d, d, BF16)), empty(rows, d)
        launch = partial(triton_ops.product, *operands, precision="bf16", out=out, add=True)
        yield Case(f"product added {rows}x{d}", targets, launch)


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
        launch = partial(triton_ops.gram_accumulate, empty(d, d), empty(TOKENS, d, dtype), precision=precision)
        yield Case(f"gram {text} {d}", targets, launch)
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
        launch = partial(triton_ops.cross_accumulate, *operands, precision=precision)
        yield Case(f"cross {text} {rows}x{d}", targets, launch)


def _lmo(text: str, targets: tuple[str, ...], d: int, k: int, *, fixed: bool = False, **options) -> Case:
    launch = partial(triton_ops.lmo, empty(ROWS, d), k, fixed=empty(ROWS, d, torch.bool) if fixed else None, **options)
    return Case(f"lmo {text}", targets, launch)


def _step(
    text: str, targets: tuple[str, ...], d: int, k: int | Tensor, *, group: int = 0, fixed: bool = True,
    target_gap: bool = False, open_loop: bool = False
) -> Case:  # fmt: skip
    """Make a step of bf16 weights, or with `target_gap` of fp32 candidates without fixed entries; products are in bf16.

    Without `open_loop` the search for the vertex starts from a threshold.
    """
    W, x, V = empty(ROWS, d, FP32 if target_gap else BF16), empty(ROWS, d), empty(ROWS, d, torch.bool)
    E, number, vector = empty(ROWS, d, BF16), empty(1, 1)[0, 0], empty(ROWS, 1)[:, 0]
    fixed = fixed and not target_gap
    options = dict(group=group, fixed=V if fixed else None, target_gap=x if target_gap else None)
    options["threshold"] = None if open_loop else vector
    state = RowState(W, x[0], x, x, x, V, E, k, vector, vector, **options)
    numbers = dict(theta=number, next_theta=number) | (dict(eta=number) if open_loop else {})
    return Case(f"step {text}", targets, partial(triton_ops.row_step, state, **numbers))


def _swaps(text: str, targets: tuple[str, ...], d: int, *, group: int = 0, fixed: bool = True) -> Case:
    W, G, R, V = empty(ROWS, d, BF16), empty(d, d), empty(ROWS, d), empty(ROWS, d, torch.bool)
    launch = partial(triton_ops.row_swaps, W, G, R, V, SWAPS, group=group, fixed=V if fixed else None)
    return Case(f"swaps {text}", targets, launch)


def _conjugate(
    text: str, targets: tuple[str, ...], d: int, *, P: torch.dtype = BF16, mask: bool = True, **place: bool
) -> Case:
    state, (rz, inverse) = empty(ROWS, d), (empty(n, 1)[:, 0] for n in (ROWS, d))
    options = dict(mask=empty(ROWS, d, torch.bool) if mask else None, **place)
    launch = partial(triton_ops.conjugate_step, state, state, empty(ROWS, d, P), state, rz, rz, inverse, **options)
    return Case(f"conjugate {text}", targets, launch)


def _adam(dtype: torch.dtype, index: torch.dtype) -> Case:
    W, (place, weight) = empty(1, ROWS * ROWS, dtype)[0], (empty(1, ROWS * ROWS // 2, t)[0] for t in (index, FP32))
    launch = partial(triton_ops.adam_step, W, W, place, weight, weight, weight, rate=0.01, step=3)
    name, of = (str(x).removeprefix("torch.") for x in (dtype, index))
    return Case(f"adam {name} {of}", ALL if dtype == BF16 else HOPPER, launch)


def _packed() -> Iterator[Case]:
    """Yield matrices at 60 % with row budgets, or with `starts`."""
    for text, targets, dtype, batch, cols, ragged in (
        ("bf16 1", ALL, BF16, 1, 8192, False),
        ("bf16 16", ALL, BF16, 16, 8192, False),
        ("fp16 16", HOPPER, torch.float16, 16, 28672, False),
        ("bf16 8 of starts", ALL, BF16, 8, 4096, True),
        ("fp32 1", ALL, FP32, 1, 4096, False),
        ("fp32 16", ALL, FP32, 16, 4096, False),
        # Words of 8 columns.
        ("bf16 1", HOPPER, BF16, 1, 4104, False),
    ):
        kept, starts = empty(ROWS, cols * 2 // 5, dtype), empty(1, ROWS + 1, torch.int64)[0]
        matrix = (kept.flatten() if ragged else kept, empty(ROWS, cols // 8, torch.uint8), starts if ragged else None)
        product = partial(triton_ops.packed_product, empty(batch, cols, dtype), *matrix)
        yield Case(f"packed_product {text} {cols}", targets, product)
        if batch == 1:
            name = f"unpack {text.split()[0]} {cols}"
            yield Case(name, targets, partial(triton_ops.unpack, *matrix, cols=cols))


def _fits(text: str, targets: tuple[str, ...], d: int) -> Iterator[Case]:
    """Yield the operations of refits, rounds and errors but products and steps: bf16 weights, products in bf16."""
    W, x, V = empty(ROWS, d, BF16), empty(ROWS, d), empty(ROWS, d, torch.bool)
    of_rows, of_columns, taken = empty(ROWS, 1)[:, 0], empty(d, 1)[:, 0], empty(ROWS, 1, torch.bool)[:, 0]
    searched = partial(triton_ops.candidates, x, x, V, of_columns, of_columns, margin=of_rows, support=V)
    bounded = partial(triton_ops.bound_scores, W, x, x, target_gap=x, damping=of_columns)
    for name, launch in (
        ("removed", partial(triton_ops.removed, W, V)),
        ("removed of a target", partial(triton_ops.removed, W, V, x)),
        ("begin_fit", partial(triton_ops.begin_fit, W, x, V, dtype=BF16)),
        ("row_errors", partial(triton_ops.row_errors, W, x)),
        ("row_errors of a fit", partial(triton_ops.row_errors, W, x, x)),
        ("take_rows", partial(triton_ops.take_rows, x, x, taken)),
        ("take_rows of a mask", partial(triton_ops.take_rows, V, V, taken)),
        ("candidates", searched),
        ("bound_scores", bounded),
        ("bound_sums", partial(triton_ops.bound_sums, x, x, V)),
        # The second of the three launches of round_mask.
        ("rounding", partial(rounding_order, x, V, x)),
    ):
        yield Case(f"{name} {text}", targets, launch)
