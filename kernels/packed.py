"""packed_product, unpack: multiply by packed matrices, and expand them.

    y = x W^T      W[r, c] = values[starts[r] + rank] if bit c % 8 of mask[r, c / 8] is set, else 0
                   rank = the number of bits set before c in row r
                   without `starts` row r begins at r k

    values (rows, k) or (n,)      mask (rows, ceil(cols / 8)) uint8      x (batch, cols)      y (batch, rows)

A program expands some rows of W from left to right, tile by tile. It counts the set bits in each word of the mask. The
running sum of these counts says where the word's weights begin in the values. A thread expands the 8 weights of a byte
one after the other: for each set bit it loads a value, and moves to the position of the next value. So a warp reads
adjacent values, and each value once. Tensor cores multiply a tile by all rows of x at the same time. If x has more than
16 rows, some rows of W are expanded at a time, and torch multiplies. Operands in fp32, or in two dtypes, are multiplied
in fp32 without tensor cores.

At a sparsity of 60 % a weight of 16 bits takes 0.925 bytes. In the code for sm_90 it takes 11.8 instructions of a lane
(11.3 for more than 4 rows of x; 15.6 with Triton 3.6): 4 for its bit and position, 2 for its address, 3 to load, clear
and pack it, 0.6 for the product. An H100 issues 8 instructions in the time it takes to load these bytes, and 17 in the
time it takes to load the 2 bytes of a dense weight. So by its instructions alone the product would take 0.7 times the
time of a dense product. But only 3 programs of 4 warps fit a multiprocessor, too few to hide the latency of memory, and
1.1 times is expected (bench/expected.py). In fp32 a weight takes 33 to 37 instructions. An H100 issues 15 in the time
of its packed bytes, and 35 in the time of its dense bytes. `unpack` takes 10.4 instructions a weight, and an H100
issues 26 in the time of the bytes. None of this has run on a GPU.
"""

import threading
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .cpu.packed import MOST, check_packed, expanded, last_row, unpacked_product
from .device import cast, dot
from .launch import FLOATS, check, check_matrix, on_device, platform, warps
from .operation import ALL, HOPPER, Arguments, Cost, Size, launch, metadata, operation
from .product import TRITON_DTYPES

# Lock for launches: transformers unpacks in several threads when it loads a checkpoint, and a server may multiply in
# several. Then launches may fail: Triton 3.6 to 3.9 gives other threads a kernel's launcher before its module is
# loaded, and the interpreter replaces functions of `triton.language` during a launch.
LAUNCH = threading.Lock()

# Number of parts of a tile's columns. Each part has separate sums, so that all warps share the products of 16 rows.
SPLIT = 4


def reference_unpacked(
    values: Tensor, mask: Tensor, starts: Tensor | None = None, *, cols: int, first: int = 0, last: int | None = None
) -> Tensor:
    """Compute `unpack` in plain torch."""
    return expanded(values, mask, cols)[first:last]


def reference(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """Compute `packed_product` in plain torch."""
    return F.linear(x, expanded(values, mask, x.shape[1]).to(x.dtype))


def cost_unpacked(values: Tensor, mask: Tensor, cols: int, first: int = 0, last: int | None = None) -> Cost:
    """Read the packed rows, and write them with their zeros."""
    rows = len(mask)
    whole = values.nbytes + mask.nbytes + rows * cols * values.itemsize
    return Cost(0, whole * ((rows if last is None else last) - first) // rows)


def cost(x: Tensor, values: Tensor, mask: Tensor) -> Cost:
    """Read the matrix and x, and write y. Products with zeros count as flops."""
    (batch, cols), rows = x.shape, len(mask)
    unit = "bf16" if x.dtype == values.dtype != torch.float32 else "ieee"
    return Cost(2 * batch * rows * cols, values.nbytes + mask.nbytes + batch * (rows + cols) * x.itemsize, unit)


def _example(size: Size, *, starts: bool = False) -> Arguments:
    """Make a matrix of which two of five weights are packed."""
    rows, k = size.rows, 2 * size.d // 5
    kept = size.matrix(seed=1).argsort(1).argsort(1) < k
    bits = F.pad(kept, (0, -size.d % 8)).view(rows, -1, 8) * 2 ** torch.arange(8, device=size.device)
    matrix = dict(values=size.normal(rows, k, dtype=size.dtype), mask=bits.sum(-1).to(torch.uint8))
    if starts:
        matrix |= dict(values=matrix["values"].flatten(), starts=k * torch.arange(rows + 1, device=size.device))
    return matrix


def example(size: Size, *, batch: int = 1, starts: bool = False) -> Arguments:
    """Make a packed matrix, and `batch` rows of x."""
    return dict(x=size.normal(batch, size.d, dtype=size.dtype, seed=2)) | _example(size, starts=starts)


# Expand a matrix once for many calls of `library`, so that their times are those of the product alone.
_dense = lru_cache(maxsize=1)(expanded)


def library(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """Multiply by the matrix with its zeros."""
    return F.linear(x, _dense(values, mask, x.shape[1]))


@triton.jit
def _popcount(x):
    """Count the bits set in each uint32, by a pattern that LLVM compiles to one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _weights(base, place, byte):
    """Load the weights of the 8 bits of every byte. `place` is the position of the first one."""
    weights = ()
    for bit in tl.static_range(8):
        kept = (byte >> bit) & 1
        weight = tl.load(base + place, mask=kept != 0, other=0.0)
        # Triton does not know (*weights, weight).
        weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
        place += kept
    return weights


@triton.jit
def _rows(VALUES, MASK, STARTS, k, words, first, last, BLOCK_R: tl.constexpr):
    """Return the rows of a program, which of them exist, and pointers to their values and masks."""
    row = first + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < last
    index = row.to(tl.int64)
    start = index * k if STARTS is None else tl.load(STARTS + index, mask=valid, other=0)
    return row, valid, VALUES + start, MASK + index * words


@triton.jit
def _tile(
    base, mask, valid, place, first, words, BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Load the weights (BLOCK_R, BLOCK_D) of a tile; also return `place` for the next tile.

    Args:
        base, mask, valid: (BLOCK_R,), from `_rows`.
        place: (BLOCK_R,) uint32, the number of values of each row before the tile.
        first: index of the tile's first word in the mask of a row.
        words: number of words, of BITS bits, in the mask of a row.
    """
    index = first + tl.arange(0, BLOCK_D // BITS)
    word = tl.load(mask[:, None] + index, mask=valid[:, None] & (index < words)[None, :], other=0).to(tl.uint32)
    count = _popcount(word)
    before = place[:, None] + tl.cumsum(count, axis=1) - count
    # (BLOCK_R, words, bytes of a word)
    start = (8 * tl.arange(0, BITS // 8)).to(tl.uint32)[None, None, :]
    word = word[:, :, None]
    at = before[:, :, None] + _popcount(word & ((1 << start) - 1))
    byte = word >> start
    base = base[:, None, None]
    w = _weights(base, at, byte)
    # `tl.join` alternates the entries of two tensors along a new last axis, and each entry stays in its thread.
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
    return tl.reshape(tl.join(even, odd), (BLOCK_R, BLOCK_D)), place + tl.sum(count, axis=1)


@triton.jit(launch_metadata=metadata(cost_unpacked))
def _unpack_kernel(
    VALUES, MASK, STARTS, W, cols, k, words, first, last,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, valid, base, mask = _rows(VALUES, MASK, STARTS, k, words, first, last, BLOCK_R)
    out = W + (row - first).to(tl.int64)[:, None] * cols
    place = tl.zeros((BLOCK_R,), tl.uint32)
    for start in range(0, words, BLOCK_D // BITS):
        w, place = _tile(base, mask, valid, place, start, words, BITS, BLOCK_R, BLOCK_D)
        column = start * BITS + tl.arange(0, BLOCK_D)
        tl.store(out + column, w, mask=valid[:, None] & (column < cols)[None, :])


@triton.jit(launch_metadata=metadata(cost))
def _product_kernel(
    X, VALUES, MASK, STARTS, Y, batch, rows, cols, k, words,
    DTYPE: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, valid, base, mask = _rows(VALUES, MASK, STARTS, k, words, 0, rows, BLOCK_R)
    member = tl.arange(0, BLOCK_B)[:, None]
    place = tl.zeros((BLOCK_R,), tl.uint32)
    y = tl.zeros((SPLIT, BLOCK_B, BLOCK_R), tl.float32)
    for start in range(0, words, BLOCK_D // BITS):
        w, place = _tile(base, mask, valid, place, start, words, BITS, BLOCK_R, BLOCK_D)
        column = (start * BITS + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(X + member * cols + column, mask=(member < batch) & (column < cols), other=0.0)
        x = tl.permute(tl.reshape(x, (BLOCK_B, SPLIT, BLOCK_D // SPLIT)), (1, 0, 2))
        w = tl.permute(tl.reshape(w, (BLOCK_R, SPLIT, BLOCK_D // SPLIT)), (1, 2, 0))
        y = dot(x, w, y, DTYPE, "ieee")
    y = cast(tl.sum(y, axis=0), Y.dtype.element_ty)
    tl.store(Y + member * rows + row[None, :], y, mask=(member < batch) & valid[None, :])


def _arguments(values: Tensor, mask: Tensor, starts: Tensor | None, cols: int) -> dict[str, object]:
    """Check the tensors of a packed matrix, and return the arguments that both kernels need.

    Raises:
        ValueError, TypeError: the tensors do not make up a packed matrix.
    """
    check("values", values, values.shape, FLOATS, values)
    check("mask", mask, mask.shape, (torch.uint8,), values)
    if starts is not None:
        check("starts", starts, starts.shape, (torch.int64,), values)
    check_packed(values, mask, starts, cols)
    whole_words = mask.numel() and mask.shape[1] % 4 == 0 and mask.data_ptr() % 4 == 0
    words = mask.view(torch.int32) if whole_words else mask
    k = values.shape[1] if starts is None else 0
    matrix = dict(VALUES=values, MASK=words, STARTS=starts)
    return dict(**matrix, cols=cols, k=k, words=words.shape[1], BITS=32 if whole_words else 8)


def configuration(size: int, batch: int = 0) -> dict[str, int]:
    """Choose tile sizes and launch options for weights of `size` bytes and `batch` rows of x; 0 is for `unpack`."""
    if platform() == "interpreter":
        return dict(BLOCK_R=32, BLOCK_D=512)
    # A program reads all of x from the cache. If x has many rows, a larger BLOCK_R makes fewer programs read them.
    BLOCK_R = 32 if batch > 4 else 16
    return dict(BLOCK_R=BLOCK_R, BLOCK_D=1024 // size // (BLOCK_R // 16), num_warps=warps(4))


@operation(
    reference_unpacked, cost_unpacked, lambda size: _example(size) | dict(cols=size.d), tolerance=0.0,
    launches=(
        launch(ALL, dtype=torch.float32),
        # Words of 8 columns.
        launch(HOPPER, d=4104),
    ),
)  # fmt: skip
def unpack(
    values: Tensor, mask: Tensor, starts: Tensor | None = None, *, cols: int, first: int = 0, last: int | None = None
) -> Tensor:
    """Expand rows of a packed matrix. The result is (last - first, cols) in the dtype of the values.

    Args:
        values: (rows, k), or (n,) with `starts`; fp32 / bf16 / fp16. All tensors are contiguous.
        mask: (rows, ceil(cols / 8)) uint8. Bits after the last column are 0.
        starts: (rows + 1,) int64, the positions in `values` at which each row begins and the last row ends.
        cols: number of columns of the matrix.
        first, last: first row, and the row after the last row; None: all rows from `first` on.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    matrix = _arguments(values, mask, starts, cols)
    last = last_row(mask, first, last)
    out = values.new_empty(last - first, cols)
    if out.numel():
        config = configuration(values.itemsize)
        with on_device(values), LAUNCH:
            _unpack_kernel[(triton.cdiv(last - first, config["BLOCK_R"]),)](
                W=out, first=first, last=last, enable_fp_fusion=True, **matrix, **config
            )
    return out


@operation(
    reference, cost, example, settings={f"batch {n}": dict(batch=n) for n in (1, 4, 16)}, tolerance=1e-2,
    library=library,
    launches=(
        launch(ALL, batch=8, starts=True),
        launch(ALL, dtype=torch.float32),
        launch(ALL, dtype=torch.float32, batch=16),
        # Words of 8 columns.
        launch(HOPPER, d=4104),
    ),
)  # fmt: skip
def packed_product(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """Compute x W^T, (batch, rows) in the dtype of x; sums are in fp32.

    Args:
        x: (batch, cols) fp32 / bf16 / fp16. If x and the values differ in dtype, both are converted to fp32.
        values, mask, starts: the packed matrix W, as for `unpack`.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    batch, cols = check_matrix("x", x, FLOATS)
    matrix = _arguments(values, mask, starts, cols)
    check("x", x, (batch, cols), FLOATS, values)
    if batch > MOST:
        return unpacked_product(x, values, mask, starts, unpack)
    y = x.new_empty(batch, len(mask))
    if y.numel():
        low = x.dtype == values.dtype != torch.float32
        config = configuration(2 if low else 4, batch)
        with on_device(x), LAUNCH:
            _product_kernel[(triton.cdiv(len(mask), config["BLOCK_R"]),)](
                X=x.contiguous(), Y=y, batch=batch, rows=len(mask),
                DTYPE=TRITON_DTYPES[x.dtype if low else torch.float32], BLOCK_B=MOST, SPLIT=SPLIT,
                enable_fp_fusion=True, **matrix, **config,
            )  # fmt: skip
    return y
