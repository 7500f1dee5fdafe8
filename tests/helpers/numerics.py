"""Triton's interpreter with the rounding of a GPU: `pytest --numerics hopper` or `--numerics ampere`.

The interpreter sums as numpy does, which is more exact than a GPU. Here it rounds as one:

- tl.dot on tensor cores. Products are exact. Those of a block and the running sum are aligned to the largest exponent
  among them. Lower bits than the last kept one are cut off. Then all are added exactly, and the sum is cut off to fp32.
- tl.dot of tf32: operands are cut off to 10 bits of mantissa. tf32x3 is three such products, with operands that are
  split by rounding to the nearest.
- tl.dot of fp32 at full precision: fused multiply-adds in the order of k.
- a * b + c: one rounding, as the compiler contracts it.
- tl.sum: entries of a thread in their order, then threads by halves.
- a / b within 2 units in the last place, and the square root within 1, as the fast instructions have it.

Sources of the first: Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores (2021); Khattak,
Mikaitis, Accurate models of NVIDIA tensor cores (arXiv 2512.07004).
"""

from typing import Any, NamedTuple

import numpy as np


class TensorCores(NamedTuple):
    """Products in a block, of 16-bit and of tf32 operands, and bits that are kept below those of fp32."""

    wide: int
    narrow: int
    extra: int


# Ampere stands for Ada (RTX 40) and the RTX 50 line, too.
TARGETS = {"hopper": TensorCores(16, 8, 2), "ampere": TensorCores(8, 4, 1)}
# Bits of fp32 that tf32 lacks.
LOST_BITS = 13
# Threads of a program, and adjacent entries that a thread loads at a time.
THREADS, ADJACENT = 128, 4
# Whether this process rounds as a GPU.
installed = False


def cut_to_fp32(x: np.ndarray) -> np.ndarray:
    """Round float64 to fp32 towards zero, in the range of normal numbers."""
    kept = np.ascontiguousarray(x, np.float64).view(np.int64) & ~((1 << 29) - 1)
    return kept.view(np.float64).astype(np.float32)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Cut the bits off that tf32 lacks."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits >> LOST_BITS << LOST_BITS).view(np.float32)


def nearest_tf32(x: np.ndarray) -> np.ndarray:
    """Round to the nearest number of tf32, ties away from zero, as the conversion instruction does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) + np.uint32(1 << (LOST_BITS - 1))
    return np.where(np.isfinite(x), cut_to_tf32(bits.view(np.float32)), x)


def has_16_bits(x: np.ndarray) -> bool:
    """Whether all entries are numbers of bf16, or all are normal numbers of fp16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return not (bits & 0xFFFF).any() or not (bits & ((1 << LOST_BITS) - 1)).any()


def block_product(a: np.ndarray, b: np.ndarray, start: np.ndarray, block: int, extra: int) -> np.ndarray:
    """Compute start (..., m, n) + a (..., m, k) b (..., k, n), all fp32, by tensor cores with such blocks."""
    total = start.astype(np.float32)
    a, b = a.astype(np.float64), b.astype(np.float64)
    for first in range(0, a.shape[-1], block):
        part = slice(first, first + block)
        products = a[..., :, part, None] * b[..., None, part, :]
        running = total.astype(np.float64)
        _, exponent = np.frexp(np.maximum(np.abs(products).max(-2), np.abs(running)))
        unit = np.ldexp(1.0, exponent - 24 - extra)
        aligned = np.trunc(products / unit[..., None, :]).sum(-2) + np.trunc(running / unit)
        exact = products.sum(-2) + running
        total = np.where(np.isfinite(exact), cut_to_fp32(aligned * unit), exact.astype(np.float32))
    return total


def fused_product(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Compute start + a b by fused multiply-adds in the order of k."""
    total = start.astype(np.float32)
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        total = (a[..., :, k, None] * b[..., k, None, :] + total).astype(np.float32)
    return total


def product(a: np.ndarray, b: np.ndarray, start: np.ndarray, precision: str, cores: TensorCores) -> np.ndarray:
    """Compute start + a b as a GPU does at a precision of tl.dot."""
    if precision == "TF32x3":
        high = nearest_tf32(a), nearest_tf32(b)
        low = nearest_tf32(a - high[0]), nearest_tf32(b - high[1])
        total = np.zeros_like(start)
        for x, y in ((low[0], high[1]), (high[0], low[1]), high):
            total = block_product(x, y, total, cores.narrow, cores.extra)
        return total + start
    if precision == "TF32":
        return block_product(cut_to_tf32(a), cut_to_tf32(b), start, cores.narrow, cores.extra)
    # Kernels give the interpreter operands of 16 bits as fp32.
    if has_16_bits(a) and has_16_bits(b):
        return block_product(a, b, start, cores.wide, cores.extra)
    return fused_product(a, b, start)


def sum_by_threads(x: np.ndarray, axis: int) -> np.ndarray:
    """Sum along an axis; it stays, with one entry."""
    x = np.moveaxis(x, axis, -1)
    threads = max(1, min(THREADS, x.shape[-1] // ADJACENT))
    if x.shape[-1] % (ADJACENT * threads) == 0:
        entries = np.moveaxis(x.reshape(*x.shape[:-1], -1, threads, ADJACENT), -2, 0)
        x = np.moveaxis(np.add.accumulate(entries.reshape(*entries.shape[:-2], -1), -1)[..., -1], 0, -1)
    while x.shape[-1] > 1:
        # Sizes are powers of two.
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return np.moveaxis(x, -1, axis)


def moved(x: np.ndarray, units: int) -> np.ndarray:
    """Move fp32 numbers by at most `units` units in the last place. A hash of a number's bits says how far.

    Powers of two, zero, infinities and subnormal numbers stay: instructions are exact there.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    by = (bits * np.uint32(2654435761) >> 16) % np.uint32(2 * units + 1) - np.uint32(units)
    exponent, mantissa = bits & 0x7F800000, bits & 0x7FFFFF
    exact = (mantissa == 0) | (exponent == 0x7F800000) | (exponent == 0)
    return np.where(exact, bits, bits + by).view(np.float32)


def install(target: str) -> None:
    """Let the interpreter of this process round as a target."""
    global installed
    installed = True
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cores, plain_sum = TARGETS[target], interpreter.ReduceOps.sum

    def is_fp32(x: Any) -> bool:
        return x.data.dtype == np.float32

    def dot(self: Any, a: Any, b: Any, start: Any, precision: Any, _: Any) -> Any:
        assert all(map(is_fp32, (a, b, start)))
        with np.errstate(all="ignore"):
            return handle(product(a.data, b.data, start.data, precision.name, cores), start.dtype.scalar)

    def multiply(self: Any, x: Any, y: Any) -> Any:
        made = self.binary_op(x, y, np.multiply)
        if is_fp32(made):
            made.factors = x.data.astype(np.float64), y.data
        return made

    def contracted(x: Any, y: Any, sign: int) -> np.ndarray | None:
        """x + sign y rounded once, if one of them is a product."""
        if hasattr(x, "factors"):
            return x.factors[0] * x.factors[1] + sign * y.data.astype(np.float64)
        if hasattr(y, "factors"):
            return x.data.astype(np.float64) + sign * (y.factors[0] * y.factors[1])
        return None

    def add(self: Any, x: Any, y: Any, sign: int = 1) -> Any:
        with np.errstate(all="ignore"):
            if is_fp32(x) and (exact := contracted(x, y, sign)) is not None:
                return handle(exact.astype(np.float32), x.dtype.scalar)
        return self.binary_op(x, y, np.add if sign > 0 else np.subtract)

    def total(self: Any, x: Any) -> Any:
        if self.axis is None or not is_fp32(x.handle):
            return plain_sum(self, x)
        made = sum_by_threads(x.handle.data, self.axis)
        return self.to_tensor(made if self.keep_dims else made.squeeze(self.axis), x.dtype)

    def off_by(units: int, exact: Any) -> Any:
        def run(self: Any, *operands: Any) -> Any:
            made = exact(self, *operands)
            return handle(moved(made.data, units), made.dtype) if is_fp32(made) else made

        return run

    builder.create_dot, builder.create_fmul, builder.create_fadd = dot, multiply, add
    builder.create_fsub = lambda self, x, y: add(self, x, y, -1)
    builder.create_fdiv, builder.create_sqrt = off_by(2, builder.create_fdiv), off_by(1, builder.create_sqrt)
    interpreter.ReduceOps.sum = total
