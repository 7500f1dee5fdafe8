"""packed_product, unpack: products with packed matrices on a GPU, and their expansion; packed_cpu.py has the formulas.

    values (rows, k) or (n,)      mask (rows, ceil(cols / 8)) uint8      x (batch, cols)      y (batch, rows)

    flops = 2 batch rows cols
    bytes = rows (k size(values) + cols / 8) + batch (cols + rows) size(x)

A program walks some rows of W from left to right, tile by tile. Each word of the mask is counted once, and a running
sum of the counts says where the word's weights begin in the values. A thread expands the 8 weights of a byte one after
the other: a bit decides whether a weight is loaded, and adds itself to the next one's place. So a warp reads adjacent
values, each once, and none that is not kept. A tile multiplies all rows of x at once on tensor cores. More than 16 rows
are multiplied by torch, which gets some rows of W at a time with zeros. Operands of 4 bytes, or of two dtypes, multiply
in fp32 without tensor cores.

At 60 % a weight of 16 bits takes 0.925 bytes, and by the code for sm_90 11.8 instructions of a lane (11.3 for more than
4 rows of x; Triton 3.6 makes 15.6): 4 for its bit and place, 2 for its address, 3 to load, clear and pack it, 0.6 for
the product. An H100 issues 8 in the time of these bytes, and 17 in that of the 2 bytes of a dense matrix. So
instructions limit it: at best it takes 1.5 times the time of its bytes, and 0.7 of that of a dense product. fp32 has 33
to 37, where 15 and 35 fit. `unpack` has 10.4, where 26 fit. Nothing has run on a GPU.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import cast, dot
from .launch import FLOATS, check, check_matrix, on_device, platform, warps
from .packed_cpu import MOST, unpacked_product

# Held while `unpack` launches: threads of transformers that load a checkpoint call it at once. Triton 3.6 to 3.9 gives
# other threads the launcher of a kernel before its module is loaded, and the interpreter replaces functions of
# `triton.language` during a launch.
LAUNCH = threading.Lock()

# Parts of a tile's columns with sums of their own, so that all warps have some of the products of 16 rows.
SPLIT = 4


@triton.jit
def _popcount(x):
    """The number of bits set in each uint32: LLVM knows this as one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _weight(base, place, byte, BIT: tl.constexpr):
    """The weights at one bit of every byte, and where the next ones are."""
    bit = (byte >> BIT) & 1
    return tl.load(base + place, mask=bit != 0, other=0.0), place + bit


@triton.jit
def _rows(VALUES, MASK, STARTS, k, words, first, last, BLOCK_R: tl.constexpr):
    """The rows of a program, whether each exists, and pointers to their values and masks."""
    row = first + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < last
    index = row.to(tl.int64)
    start = index * k if STARTS is None else tl.load(STARTS + index, mask=valid, other=0)
    return row, valid, VALUES + start, MASK + index * words


@triton.jit
def _tile(
    base, mask, valid, place, first, words, BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The weights (BLOCK_R, BLOCK_D) of a tile, and where those of the next one are.

    Args:
        base, mask, valid: (BLOCK_R,), as `_rows` gives them.
        place: (BLOCK_R,) uint32, how many values of each row came before.
        first: index of the tile's first word in the mask of a row, which has `words` of BITS bits.
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
    w0, at = _weight(base, at, byte, 0)
    w1, at = _weight(base, at, byte, 1)
    w2, at = _weight(base, at, byte, 2)
    w3, at = _weight(base, at, byte, 3)
    w4, at = _weight(base, at, byte, 4)
    w5, at = _weight(base, at, byte, 5)
    w6, at = _weight(base, at, byte, 6)
    w7, at = _weight(base, at, byte, 7)
    # Joined tensors alternate along a new last axis, in the same thread.
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (BLOCK_R, BLOCK_D)), place + tl.sum(count, axis=1)


@triton.jit
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


@triton.jit
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
    """What both kernels need of a packed matrix.

    Raises:
        ValueError, TypeError: for tensors that are none.
    """
    rows = check_matrix("mask", mask, (torch.uint8,))[0]
    check("mask", mask, (rows, triton.cdiv(cols, 8)), (torch.uint8,), values)
    if starts is None:
        check_matrix("values", values, FLOATS)
        check("values", values, (rows, values.shape[1]), FLOATS, mask)
    else:
        check("values", values, (values.numel(),), FLOATS, mask)
        check("starts", starts, (rows + 1,), (torch.int64,), values)
    for name, tensor in dict(values=values, mask=mask, starts=starts).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous entries, got strides {tensor.stride()}")
    whole = mask.shape[1] % 4 == 0 and mask.data_ptr() % 4 == 0
    words = mask.view(torch.int32) if whole else mask
    k = values.shape[1] if starts is None else 0
    matrix = dict(VALUES=values, MASK=words, STARTS=starts)
    return dict(**matrix, cols=cols, k=k, words=words.shape[1], BITS=32 if whole else 8)


def configuration(size: int, batch: int = 0) -> dict[str, int]:
    """Tile sizes and launch options for weights of this many bytes; `batch` is 0 to unpack."""
    if platform() == "interpreter":
        return dict(BLOCK_R=32, BLOCK_D=512)
    # x is read for every BLOCK_R rows of W, from the cache: more rows of x are read less often.
    BLOCK_R = 32 if batch > 4 else 16
    return dict(BLOCK_R=BLOCK_R, BLOCK_D=1024 // size // (BLOCK_R // 16), num_warps=warps(4))


def unpack(
    values: Tensor, mask: Tensor, starts: Tensor | None = None, *, cols: int, first: int = 0, last: int | None = None
) -> Tensor:
    """Rows first to last of a packed matrix with zeros, (last - first, cols) in the dtype of the values.

    Args:
        values: (rows, k), or (n,) with `starts`; fp32 / bf16 / fp16. Contiguous, as all others.
        mask: (rows, ceil(cols / 8)) uint8. Bits behind the last column are 0.
        starts: (rows + 1,) int64, where each row begins in the values, and where the last one ends.
        cols: columns of the matrix.
        first, last: the rows that are wanted; all without `last`.

    Raises:
        ValueError, TypeError: for arguments that do not fit this description.
    """
    matrix = _arguments(values, mask, starts, cols)
    last = len(mask) if last is None else last
    if not 0 <= first <= last <= len(mask):
        raise ValueError(f"first, last: expected rows of {len(mask)}, got {first} to {last}")
    out = values.new_empty(last - first, cols)
    if out.numel():
        config = configuration(values.element_size())
        with on_device(values), LAUNCH:
            _unpack_kernel[(triton.cdiv(last - first, config["BLOCK_R"]),)](
                W=out, first=first, last=last, enable_fp_fusion=True, **matrix, **config
            )
    return out


def packed_product(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """x W^T, (batch, rows) in the dtype of x; sums are made in fp32.

    Args:
        x: (batch, cols) fp32 / bf16 / fp16, contiguous. Where its dtype is not that of the values, both are widened.
        values, mask, starts: the packed matrix, as `unpack` takes it.

    Raises:
        ValueError, TypeError: for arguments that do not fit this description.
    """
    batch, cols = check_matrix("x", x, FLOATS)
    matrix = _arguments(values, mask, starts, cols)
    check("x", x, (batch, cols), FLOATS, values)
    if not x.is_contiguous():
        raise ValueError(f"x: expected contiguous entries, got strides {x.stride()}")
    if batch > MOST:
        return unpacked_product(x, values, mask, starts, unpack)
    y = x.new_empty(batch, len(mask))
    if y.numel():
        low = x.dtype == values.dtype != torch.float32
        config = configuration(2 if low else 4, batch)
        dtype = tl.float32 if not low else tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
        with on_device(x):
            _product_kernel[(triton.cdiv(len(mask), config["BLOCK_R"]),)](
                X=x, Y=y, batch=batch, rows=len(mask), DTYPE=dtype, BLOCK_B=MOST, SPLIT=SPLIT,
                enable_fp_fusion=True, **matrix, **config,
            )  # fmt: skip
    return y
