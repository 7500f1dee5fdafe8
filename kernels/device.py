"""Device functions that several kernels call: rounding, dot product, order of tiles, chunks of rows.

Kernels only load bfloat16, store it, and multiply it in `dot`. They convert it to fp32 before any other arithmetic,
since the interpreter would compute with its bit patterns.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Convert x to DTYPE, rounded to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE and x.dtype != tl.bfloat16:
        # The interpreter truncates where a GPU rounds. After this rounding no bits are left to truncate.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Compute acc + a b in fp32, with operands in DTYPE. Operands in fp32 are multiplied at PRECISION."""
    a = cast(a, DTYPE)
    b = cast(b, DTYPE)
    if INTERPRET:
        # numpy has no bfloat16, and fp32 holds 16-bit values exactly.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split a tile into its left and its right half."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def quarters(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split a tile by its columns into quarters, from left to right."""
    left, right = halves(x, BLOCK_M, BLOCK_N)
    first, second = halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = halves(right, BLOCK_M, BLOCK_N // 2)
    return first, second, third, fourth


@triton.jit
def grouped_tile(tile, rows, d, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Find the first row and the first column of a tile of a (rows, d) product.

    Tiles are numbered in groups of GROUP_M rows of tiles. So programs that run at the same time share rows of the left
    operand, and columns of the right operand, in the cache.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(d, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first_m + within % group_m) * BLOCK_M, within // group_m * BLOCK_N


@triton.jit
def triangle_tile(tile, d, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Find the first row and the first column of one of `launch.triangle_tiles` tiles of a (d, d) lower triangle.

    Squares cover the triangle and its diagonal. The right half of the squares, turned by 180 degrees (marked by '),
    completes the left half to a rectangle. `grouped_tile` numbers the tiles of the rectangle:

        0              3' 2'                   0  2'
        0 1            0  2'    4 squares      0  1    3 squares
        0 1 2          0  1     a side         0  1    a side
        0 1 2 3        0  1
                       0  1
    """
    SIDE: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    squares = tl.cdiv(d, SIDE)
    odd = squares % 2
    first_m, first_n = grouped_tile(
        tile, (squares + 1 - odd) * SIDE, (squares + odd) // 2 * SIDE, GROUP_M, BLOCK_M, BLOCK_N
    )
    row = first_m // SIDE + odd
    column = first_n // SIDE
    turned = row <= column
    row_of_square = tl.where(turned, squares - 1 + odd - row, row - 1)
    column_of_square = tl.where(turned, squares - 1 + odd - column, column)
    first_m = row_of_square * SIDE + first_m % SIDE
    first_n = column_of_square * SIDE + first_n % SIDE
    # Triton 3.6 cannot infer these multiples, and would load entries one by one.
    return tl.multiple_of(first_m, BLOCK_M), tl.multiple_of(first_n, BLOCK_N)


@triton.jit
def load(X, column, valid):
    """Load valid columns of the tile's rows, and 0 for others. X points at the first column of each row."""
    return tl.load(X + column[None, :], mask=valid, other=0)


@triton.jit
def store(X, column, x, valid):
    """Store x in valid columns of the tile's rows, rounded to the dtype of X."""
    tl.store(X + column[None, :], cast(x, X.dtype.element_ty), mask=valid)


@triton.jit
def columns(
    start, d, valid_r, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr = 0, PADDED: tl.constexpr = 0, TOGETHER: tl.constexpr = 4,
):  # fmt: skip
    """Compute the columns of one chunk, which of them exist, and which entries (BLOCK_R, BLOCK_D) are of valid rows.

    Each group of GROUP columns is padded to PADDED columns, a power of two, so that a chunk reshapes into whole groups.
    A thread has at most TOGETHER adjacent columns.
    """
    # With 4 adjacent columns in a thread, matrices with entries of 1, 2 and 4 bytes have the same layout in registers.
    # With 16 adjacent bytes in a thread the layouts would differ, and entries would have to change threads through
    # shared memory.
    index = start + tl.max_contiguous(tl.arange(0, BLOCK_D), TOGETHER)
    if GROUP == PADDED:
        column = index
        exists = index < d
    else:
        column = index // PADDED * GROUP + index % PADDED
        exists = (index % PADDED < GROUP) & (column < d)
    return column, exists, valid_r[:, None] & exists[None, :]
