"""List the launches that compiled.py compiles: realistic shapes, each configuration of each kernel at least once."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsefw.kernels import triton_ops
from sparsefw.kernels.definitions import RowState
from sparsefw.kernels.rounding import rounding_order

ALL, NVIDIA = ("sm_80", "sm_90", "sm_100", "gfx942"), ("sm_80", "sm_90", "sm_100")
BULK, HOPPER = ("sm_90", "sm_100"), ("sm_90",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, TOKENS = 4096, 2048


@dataclass(frozen=True)
class Case:
    """One launch: its name, and the targets it is compiled for."""

    name: str
    targets: tuple[str, ...]
    launch: partial


def case(name: str, targets: tuple[str, ...], operation: Callable, *arguments: Any, **options: Any) -> Case:
    """Make the case of an operation that is called with these arguments."""
    return Case(name, targets, partial(operation, *arguments, **options))


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
        names[case] = [module.__name__.rpartition(".")[2], *operations(case)]
        imported[case] = re.findall(r"^from \.(\w+) import", inspect.getsource(module), re.MULTILINE)
    chosen = [case for case in every if text in case.name or text in names[case]]
    if chosen := chosen or [case for case in every if text in imported[case]]:
        return chosen
    known = sorted({name for case in every for name in (*names[case], *imported[case])})
    sys.exit(f"{text}: no launch, no operation and no file of kernels/; there are {', '.join(known)}")


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Make a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    """Yield all launches."""
    yield from _products()
    yield from _accumulations()
    yield from _steps()
    yield from _swaps()
    yield from _conjugate_steps()
    yield from _adam_steps()
    yield from _packed()
    yield case("mirror 4096", ALL, triton_ops.mirror_lower, empty(4096, 4096))
    for d, targets in ((576, HOPPER), (4096, ALL), (28672, HOPPER)):
        yield from _fits(targets, d)


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
        operands = empty(rows, d, dtype=E), empty(d, d, dtype=G)
        yield case(f"product {text} {rows}x{d}", targets, triton_ops.product, *operands, precision=precision)
    for rows, d, targets in ((4096, 4096, ALL), (8192, 28672, HOPPER), (576, 576, HOPPER)):
        operands, out = (empty(rows, d, dtype=BF16), empty(d, d, dtype=BF16)), empty(rows, d)
        name = f"product added {rows}x{d}"
        yield case(name, targets, triton_ops.product, *operands, precision="bf16", out=out, add=True)


def _accumulations() -> Iterator[Case]:
    # The dtype of the inputs, and the precision of their products.
    inputs = {"bf16": (BF16, "ieee"), "fp16": (FP16, "ieee"), "tf32": (FP32, "tf32"), "ieee": (FP32, "ieee")}
    for text, targets, d in (
        ("bf16", HOPPER, 576),
        ("bf16", ALL, 4096),
        ("bf16", BULK, 14336),
        ("fp16", HOPPER, 28672),
        # Rows are not aligned for bulk copies.
        ("bf16", BULK, 4100),
        ("tf32", NVIDIA, 4096),
    ):
        dtype, precision = inputs[text]
        operands = empty(d, d), empty(TOKENS, d, dtype=dtype)
        yield case(f"gram {text} {d}", targets, triton_ops.gram_accumulate, *operands, precision=precision)
    for text, targets, rows, d in (
        ("bf16", HOPPER, 1536, 576),
        ("bf16", ALL, 4096, 4096),
        ("bf16", HOPPER, 4096, 14336),
        ("fp16", HOPPER, 8192, 28672),
        ("bf16", BULK, 4100, 4100),
        ("tf32", NVIDIA, 4096, 4096),
        ("ieee", NVIDIA, 576, 576),
    ):
        dtype, precision = inputs[text]
        operands = empty(rows, d), empty(TOKENS, rows, dtype=dtype), empty(TOKENS, d, dtype=dtype)
        yield case(f"cross {text} {rows}x{d}", targets, triton_ops.cross_accumulate, *operands, precision=precision)


def _steps() -> Iterator[Case]:
    """Yield selections of vertices, and steps of Frank-Wolfe."""
    for d, targets in ((576, HOPPER), (4096, ALL), (8192, HOPPER), (14336, ALL), (28672, ALL), (65536, ALL)):
        fixed = empty(ROWS, d, dtype=torch.bool)
        yield case(f"lmo {d}", targets, triton_ops.lmo, empty(ROWS, d), d // 2, fixed=fixed, positive=True)
        yield _step(f"{d}", targets, d, d // 2)
    for n, m in ((2, 4), (16, 32)):
        yield case(f"lmo {n}:{m} 4096", ALL, triton_ops.lmo, empty(ROWS, 4096), n, fixed=None, group=m)
        yield _step(f"{n}:{m} 4096", HOPPER, 4096, n, group=m)
        yield _step(f"{n}:{m} 14336", ALL, 14336, n, group=m)
    yield _step("of a target 4096", HOPPER, 4096, 2048, target_gap=True)
    yield _step("of a target 28672", HOPPER, 28672, 14336, target_gap=True)
    yield _step("3:5 4095", HOPPER, 4095, 3, group=5)
    yield _step("open loop 3:5 320", ALL, 320, 3, group=5, open_loop=True)
    yield _step("open loop 4096", HOPPER, 4096, empty(ROWS, dtype=torch.int32), open_loop=True)


def _step(
    text: str, targets: tuple[str, ...], d: int, k: int | Tensor, *, group: int = 0, target_gap: bool = False,
    open_loop: bool = False
) -> Case:  # fmt: skip
    """Make a step of bf16 weights, or with `target_gap` of fp32 candidates; products are in bf16.

    Entries are fixed, but not of candidates, nor with a budget for each row. Without `open_loop` the search for the
    vertex starts from a threshold.
    """
    W, x, V = empty(ROWS, d, dtype=FP32 if target_gap else BF16), empty(ROWS, d), empty(ROWS, d, dtype=torch.bool)
    E, of_rows, theta = empty(ROWS, d, dtype=BF16), empty(ROWS), empty()
    state = RowState(
        *(W, x[0], x, x, x, V, E, k, of_rows, of_rows),
        group=group,
        fixed=None if target_gap or isinstance(k, Tensor) else V,
        target_gap=x if target_gap else None,
        threshold=None if open_loop else of_rows,
    )
    eta = dict(eta=theta) if open_loop else {}
    return case(f"step {text}", targets, triton_ops.row_step, state, theta=theta, next_theta=theta, **eta)


def _swaps() -> Iterator[Case]:
    for text, targets, d, group in (
        ("576", HOPPER, 576, 0),
        ("4096", ALL, 4096, 0),
        ("28672", ALL, 28672, 0),
        ("of 4 4096", ALL, 4096, 4),
        ("of 32 14336", ALL, 14336, 32),
        ("of 5 4095", ALL, 4095, 5),
    ):
        V = empty(ROWS, d, dtype=torch.bool)
        operands = empty(ROWS, d, dtype=BF16), empty(d, d), empty(ROWS, d), V
        fixed = V if group in (0, 4) else None
        yield case(f"swaps {text}", targets, triton_ops.row_swaps, *operands, 100, group=group, fixed=fixed)


def _conjugate_steps() -> Iterator[Case]:
    for text, targets, d, dtype in (
        ("576", NVIDIA, 576, BF16),
        ("1536", NVIDIA, 1536, BF16),
        ("8192", HOPPER, 8192, BF16),
        ("4096", ALL, 4096, BF16),
        ("first 4096", HOPPER, 4096, BF16),
        ("last 4096", HOPPER, 4096, BF16),
        ("28672", ALL, 28672, BF16),
        ("first 28672", HOPPER, 28672, BF16),
        ("last 28672", HOPPER, 28672, BF16),
        # Without a mask.
        ("target 4096", HOPPER, 4096, BF16),
        ("fp32 4096", HOPPER, 4096, FP32),
        ("fp32 28672", HOPPER, 28672, FP32),
    ):
        Z, P, of_rows = empty(ROWS, d), empty(ROWS, d, dtype=dtype), empty(ROWS)
        options = {place: True for place in ("first", "last") if place in text}
        options["mask"] = None if "target" in text else empty(ROWS, d, dtype=torch.bool)
        operands = Z, Z, P, Z, of_rows, of_rows, empty(d)
        yield case(f"conjugate {text}", targets, triton_ops.conjugate_step, *operands, **options)


def _adam_steps() -> Iterator[Case]:
    for text, targets, dtype, index in (
        ("bfloat16 int32", ALL, BF16, torch.int32),
        ("float16 int32", HOPPER, FP16, torch.int32),
        ("float32 int32", HOPPER, FP32, torch.int32),
        ("bfloat16 int64", ALL, BF16, torch.int64),
    ):
        entries = ROWS * ROWS
        W, place, weight = empty(entries, dtype=dtype), empty(entries // 2, dtype=index), empty(entries // 2)
        state = W, W, place, weight, weight, weight
        yield case(f"adam {text}", targets, triton_ops.adam_step, *state, rate=0.01, step=3)


def _packed() -> Iterator[Case]:
    """Yield matrices at 60 % with row budgets, or with `starts`."""
    for text, targets, dtype, batch, cols in (
        ("bf16 1", ALL, BF16, 1, 8192),
        ("bf16 16", ALL, BF16, 16, 8192),
        ("fp16 16", HOPPER, FP16, 16, 28672),
        ("bf16 8 of starts", ALL, BF16, 8, 4096),
        ("fp32 1", ALL, FP32, 1, 4096),
        ("fp32 16", ALL, FP32, 16, 4096),
        # Words of 8 columns.
        ("bf16 1", HOPPER, BF16, 1, 4104),
    ):
        values, mask = empty(ROWS, cols * 2 // 5, dtype=dtype), empty(ROWS, cols // 8, dtype=torch.uint8)
        starts = empty(ROWS + 1, dtype=torch.int64)
        matrix = (values.flatten(), mask, starts) if "starts" in text else (values, mask, None)
        x = empty(batch, cols, dtype=dtype)
        yield case(f"packed_product {text} {cols}", targets, triton_ops.packed_product, x, *matrix)
        if batch == 1:
            yield case(f"unpack {text.split()[0]} {cols}", targets, triton_ops.unpack, *matrix, cols=cols)


def _fits(targets: tuple[str, ...], d: int) -> Iterator[Case]:
    """Yield the other operations of refits, rounds and errors, with bf16 weights and products in bf16."""
    W, x, V = empty(ROWS, d, dtype=BF16), empty(ROWS, d), empty(ROWS, d, dtype=torch.bool)
    of_rows, of_columns, taken = empty(ROWS), empty(d), empty(ROWS, dtype=torch.bool)
    ops, fit = triton_ops, (x, x, V, of_columns, of_columns)
    yield case(f"removed {d}", targets, ops.removed, W, V)
    yield case(f"removed of a target {d}", targets, ops.removed, W, V, x)
    yield case(f"begin_fit {d}", targets, ops.begin_fit, W, x, V, dtype=BF16)
    yield case(f"row_errors {d}", targets, ops.row_errors, W, x)
    yield case(f"row_errors of a fit {d}", targets, ops.row_errors, W, x, x)
    yield case(f"take_rows {d}", targets, ops.take_rows, x, x, taken)
    yield case(f"take_rows of a mask {d}", targets, ops.take_rows, V, V, taken)
    yield case(f"candidates {d}", targets, ops.candidates, *fit, margin=of_rows, support=V)
    yield case(f"bound_scores {d}", targets, ops.bound_scores, W, x, x, target_gap=x, damping=of_columns)
    yield case(f"bound_sums {d}", targets, ops.bound_sums, x, x, V)
    # The second of the three launches of round_mask.
    yield case(f"rounding {d}", targets, rounding_order, x, V, x)
