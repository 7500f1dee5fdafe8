"""accumulate: add D^T X to S, or to the lower triangle of S, in place; for gram.py and cross.py.

    D (tokens, rows), X (tokens, d) fp32 / bf16 / fp16, of the same dtype     S (rows, d) fp32

There are two kernels. One program adds to an entry of S, once, so every run gives the same bits. Products of bf16 and
fp16 inputs are exact; fp32 inputs are rounded to `precision`. Sums are accumulated in fp32, but tensor cores cut off
what does not fit, always towards 0, so sums of squares are too small. By a model of their arithmetic
(tests/helpers/numerics.py) the diagonal of a Gram matrix of 16-bit inputs misses this share of itself:

    tokens of a call                    2,048    8,192    16,384
    sm_80 and sm_120, at once            9e-6     5e-5      1e-4
    with partial sums, as they are       9e-6     9e-6      9e-6
    sm_90 and sm_100                     5e-6     3e-5      6e-5

On sm_80 and sm_120 a thread adds partial sums of 2,048 tokens by plain additions: 64 of them, and 64 registers that
were free. On sm_90 no registers are free for that beside tiles of 128 x 256. Eight launches would move S eight times:
at 16,384 tokens 0.15 ms more in memory, beside 0.39 ms of products (d = 4096).

One kernel runs on sm_90 and later, except sm_120, for 16-bit inputs if large tiles fill the GPU and rows are aligned to
16 bytes. It launches a program on each multiprocessor, and each program computes several tiles. Bulk copies through
tensor descriptors load both operands to shared memory, and tensor cores read the operands transposed from there. So no
thread computes an address or moves an operand. Bulk copies also add each finished tile to S in memory, so no thread
loads S. At the same time the loads of the next tile run. Tiles on the diagonal also change entries above the diagonal,
which `mirror_lower` overwrites in the end.

For 64 tokens a tile of 128 x 256 entries takes at least 1024 cycles of an H100's tensor cores. The tile reads 48 KiB
from the L2 cache, so it makes 85 flops for each byte. A tile of 128 x 128 makes 64.

In all other cases the other kernel runs: every program computes one tile, and its threads load operands through
pointers, ahead of the dot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import INTERPRET, dot, grouped_tile, quarters, triangle_tile
from .launch import describable, multiprocessors, on_device, platform, triangle_tiles, vectorized
from .operation import Cost, metadata
from .product import DESCRIPTORS, dot_options

# Dtypes that tensor cores can read transposed from shared memory.
TRANSPOSABLE = (torch.bfloat16, torch.float16)

# Pairs of the expected relative time of a tile and its launch options. Small tiles win if large tiles would leave most
# multiprocessors without a tile in the last round.
TILES = (
    (8, dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=16, num_warps=8, num_stages=4)),
    (5, dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=16, num_warps=8, num_stages=6)),
)

# With fewer tiles of 128 x 128 than this, tiles of 64 x 64 fill a GPU better.
ENOUGH = 128

# Tokens of a partial sum.
PARTIAL = 2048


def cost(S: Tensor, X: Tensor, precision: str = "ieee", triangle: bool = False) -> Cost:
    """Read D and X; read and write S, or its lower triangle. D has the dtype of X, and is X for a triangle."""
    (tokens, d), rows = X.shape, len(S)
    entries, inputs = (d * (d + 1) // 2, d) if triangle else (rows * d, rows + d)
    unit = "bf16" if X.itemsize == 2 else precision
    return Cost(2 * tokens * entries, tokens * inputs * X.itemsize + 8 * entries, unit)


def tile_count(rows: int, d: int, triangle: bool, block_m: int, block_n: int) -> int:
    """Count the tiles of a (rows, d) matrix, or of its lower triangle."""
    return triangle_tiles(d, block_m, block_n) if triangle else triton.cdiv(rows, block_m) * triton.cdiv(d, block_n)


def suits(S: Tensor, D: Tensor, X: Tensor, triangle: bool) -> bool:
    """Tell whether bulk copies can load D and X and add to S, and S has enough tiles to fill a GPU."""
    able = platform() in DESCRIPTORS and X.dtype in TRANSPOSABLE and all(map(describable, (S, D, X)))
    return able and tile_count(len(S), S.shape[1], triangle, 128, 128) >= ENOUGH


def bulk_configuration(rows: int, d: int, triangle: bool, programs: int) -> dict[str, int]:
    """Choose the launch options with the least expected time: rounds of `programs` tiles, times the time of a tile."""

    def seconds(entry: tuple[int, dict[str, int]]) -> int:
        cost, options = entry
        tiles = tile_count(rows, d, triangle, options["BLOCK_M"], options["BLOCK_N"])
        return cost * triton.cdiv(tiles, programs)

    return min(TILES, key=seconds)[1]


def configuration(rows: int, d: int, triangle: bool, size: int, vectors: bool) -> dict[str, int]:
    """Choose tile sizes and launch options for loads through pointers.

    Args:
        rows, d, triangle: shape of S, and whether only its lower triangle is computed.
        size: bytes of an entry of the inputs.
        vectors: whether a thread can load several entries by one instruction, see `launch.vectorized`.
    """
    target = platform()
    if target == "interpreter":
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8, PARTIAL=PARTIAL)
    BLOCK_K, stages = 128 // size, dict(hip=2, sm_80=3, sm_90=4)[target]
    # Larger tiles spill in the epilogue, where registers hold a tile of S and the sums.
    BLOCK, num_warps = 128, 8
    if tile_count(rows, d, triangle, 128, 128) < ENOUGH or not vectors:
        # Large tiles are too few to fill a GPU, or they would spill, since each entry is loaded by an instruction of
        # its own. In that case small tiles spill on sm_80 as well, unless 8 warps share the addresses.
        BLOCK, num_warps = 64, 4 if vectors else 8
    elif target == "hip":
        BLOCK_K, num_warps = BLOCK_K // 2, 4
    elif target == "sm_80" and size == 4:
        # Steps of 128 bytes need 245 registers on sm_80, and spill on sm_120. Steps of half the size need 158 and 150.
        BLOCK_K, stages = BLOCK_K // 2, stages + 1
    options = dict(num_warps=num_warps, num_stages=stages, PARTIAL=PARTIAL if target == "sm_80" and size == 2 else 0)
    return dict(BLOCK_M=BLOCK, BLOCK_N=BLOCK, BLOCK_K=BLOCK_K, GROUP_M=8, **options)


@triton.jit
def _add(S, first_m, first_n, tile):
    if INTERPRET:
        # The interpreter has no bulk copies that add. It runs one program at a time, so a load and a store do the same.
        S.store([first_m, first_n], S.load([first_m, first_n]) + tile)
    else:
        S.atomic_add([first_m, first_n], tile)


# Every batch of an expert has another number of tokens. Without specialization to it a run compiles this kernel once.
# `_pointer_kernel` is specialized: else the masks of its loads cost registers, and it spills on sm_80.
@triton.jit(do_not_specialize=["tokens", "tiles"], launch_metadata=metadata(cost))
def _bulk_kernel(
    S, D, X, tokens, rows, d, tiles,
    TRIANGLE: tl.constexpr, DTYPE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # In a flattened loop the loads of the next tile start while this tile is added. For sm_100 the loop is not
    # flattened: Triton 3.6 would give each quarter of a tile its own shared memory, and there is too little.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not cuda_capability_geq(10)):
        if TRIANGLE:
            first_m, first_n = triangle_tile(tile, d, GROUP_M, BLOCK_M, BLOCK_N)
        else:
            first_m, first_n = grouped_tile(tile, rows, d, GROUP_M, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, tokens, BLOCK_K):
            # Entries past the edges of D and X read as 0. Nothing is added past the edges of S.
            a = D.load([start, first_m])
            b = X.load([start, first_n])
            acc = dot(a.T, b, acc, DTYPE, "ieee")
        # A tile passes through shared memory on its way to global memory. It goes in quarters, since the operands of
        # the next tile fill the rest of shared memory.
        parts = quarters(acc, BLOCK_M, BLOCK_N)
        for n in tl.static_range(4):
            _add(S, first_m, first_n + n * (BLOCK_N // 4), parts[n])


@triton.jit(launch_metadata=metadata(cost))
def _pointer_kernel(
    S, D, X, tokens, rows, d, stride_sr, stride_sd, stride_dt, stride_dr, stride_xt, stride_xd,
    TRIANGLE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr = 0,
):  # fmt: skip
    if TRIANGLE:
        first_m, first_n = triangle_tile(tl.program_id(0), d, GROUP_M, BLOCK_M, BLOCK_N)
    else:
        first_m, first_n = grouped_tile(tl.program_id(0), rows, d, GROUP_M, BLOCK_M, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # Indices past the edge are masked, and not clamped as in product.py, since these loads are contiguous along them.
    valid_m = offs_m < rows
    valid_n = offs_n < d
    token = offs_k.to(tl.int64)
    # A tile of D^T is loaded directly. If it were transposed after the load, sm_80 would not load 16-bit tiles ahead.
    d_ptrs = D + token[None, :] * stride_dt + offs_m.to(tl.int64)[:, None] * stride_dr
    x_ptrs = X + token[:, None] * stride_xt + offs_n.to(tl.int64)[None, :] * stride_xd
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PARTIAL:
        total = acc
    for start in range(0, tokens, BLOCK_K):
        valid_k = offs_k < tokens - start
        a = tl.load(d_ptrs, mask=valid_m[:, None] & valid_k[None, :], other=0.0)
        b = tl.load(x_ptrs, mask=valid_k[:, None] & valid_n[None, :], other=0.0)
        acc = dot(a, b, acc, DTYPE, PRECISION)
        d_ptrs += BLOCK_K * stride_dt
        x_ptrs += BLOCK_K * stride_xt
        # The outer condition is decided by the compiler.
        if PARTIAL:  # noqa: SIM102
            if (start + BLOCK_K) % PARTIAL == 0:
                total += acc
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PARTIAL:
        acc += total

    row = offs_m.to(tl.int64)[:, None]
    column = offs_n.to(tl.int64)[None, :]
    valid = valid_m[:, None] & valid_n[None, :]
    if TRIANGLE:
        # Entries above the diagonal, which only tiles on the diagonal have, are not stored.
        valid = valid & (row >= column)
    s_ptrs = S + row * stride_sr + column * stride_sd
    tl.store(s_ptrs, tl.load(s_ptrs, mask=valid, other=0.0) + acc, mask=valid)


def accumulate(S: Tensor, D: Tensor, X: Tensor, precision: str, *, triangle: bool = False) -> Tensor:
    """Add D^T X to S in place, and return S. The caller has checked the matrices.

    Args:
        S: (rows, d) fp32, any strides.
        D: (tokens, rows), fp32 / bf16 / fp16, any strides.
        X: (tokens, d), dtype of D, any strides.
        precision: rounding of fp32 inputs, "ieee" or "tf32".
        triangle: whether to add only to the lower triangle of S; rows = d. Entries above it become undefined.

    Raises:
        ValueError: the precision is unknown, or would need a split or converted copy of fp32 inputs.
    """
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision: expected ieee or tf32, got {precision!r}")
    if D.numel() == 0 or X.numel() == 0:
        return S
    (tokens, d), rows = X.shape, len(S)
    with on_device(X):
        options = dot_options((D.dtype, X.dtype), precision)
        shared = dict(TRIANGLE=triangle, DTYPE=options["DTYPE"], enable_fp_fusion=True)
        if not suits(S, D, X, triangle):
            config = configuration(rows, d, triangle, X.itemsize, vectorized(D) and vectorized(X))
            _pointer_kernel[(tile_count(rows, d, triangle, config["BLOCK_M"], config["BLOCK_N"]),)](
                S, D, X, tokens, rows, d, *S.stride(), *D.stride(), *X.stride(),
                PRECISION=options["PRECISION"], **shared, **config,
            )  # fmt: skip
            return S
        programs = multiprocessors(X.device)
        config = bulk_configuration(rows, d, triangle, programs)
        m, n, k = (config[f"BLOCK_{axis}"] for axis in "MNK")
        tiles = tile_count(rows, d, triangle, m, n)
        _bulk_kernel[(min(tiles, programs),)](
            TensorDescriptor.from_tensor(S, [m, n // 4]),
            TensorDescriptor.from_tensor(D, [k, m]),
            TensorDescriptor.from_tensor(X, [k, n]),
            tokens, rows, d, tiles, **shared, **config,
        )  # fmt: skip
    return S
