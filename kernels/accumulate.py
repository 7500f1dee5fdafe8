"""accumulate: add D^T X to S, or to the lower triangle of S, in place by bulk copies; for gram.py and cross.py.

    D (tokens, rows), X (tokens, d), both bf16 or both fp16     S (rows, d) fp32

The kernel runs on sm_90 and later. It launches a program on each multiprocessor, and each program computes several
tiles. Bulk copies through tensor descriptors load both operands to shared memory, and tensor cores read the operands
transposed from there. So no thread computes an address or moves an operand. Bulk copies also add each finished tile to
S in memory, so no thread loads S. At the same time the loads of the next tile run.

One program adds to an entry of S, once, so every run gives the same bits. Products are exact, and sums are accumulated
in fp32. Tiles on the diagonal also change entries above the diagonal, which `mirror_lower` overwrites in the end.

For 64 tokens a tile of 128 x 256 entries takes at least 1024 cycles of an H100's tensor cores. The tile reads 48 KiB
from the L2 cache, so it makes 85 flops for each byte. A tile of 128 x 128 makes 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import INTERPRET, dot, grouped_tile, quarters, triangle_tile
from .launch import describable, multiprocessors, platform, triangle_tiles
from .operation import Cost, metadata
from .product import DESCRIPTORS, TRITON_DTYPES

# Dtypes that tensor cores can read transposed from shared memory.
TRANSPOSABLE = (torch.bfloat16, torch.float16)

# Pairs of the expected relative time of a tile and its launch options. Small tiles win if large tiles would leave most
# multiprocessors without a tile in the last round.
TILES = (
    (8, dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=16, num_warps=8, num_stages=4)),
    (5, dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=16, num_warps=8, num_stages=6)),
)

# With fewer tiles of 128 x 128 than this, the smaller tiles of gram.py and cross.py fill a GPU better.
ENOUGH = 128


def cost(S: Tensor, X: Tensor, precision: str = "ieee", triangle: bool = False) -> Cost:
    """Read D and X; read and write S, or its lower triangle. D has the dtype of X."""
    (tokens, d), rows = X.shape, len(S)
    unit = "bf16" if X.itemsize == 2 else precision
    if triangle:
        return Cost(tokens * d * (d + 1), X.nbytes + 4 * d * (d + 1), unit)
    return Cost(2 * tokens * rows * d, tokens * (rows + d) * X.itemsize + 8 * rows * d, unit)


def tile_count(rows: int, d: int, triangle: bool, block_m: int, block_n: int) -> int:
    """Count the tiles of a (rows, d) matrix, or of its lower triangle."""
    return triangle_tiles(d, block_m, block_n) if triangle else triton.cdiv(rows, block_m) * triton.cdiv(d, block_n)


def suits(S: Tensor, D: Tensor, X: Tensor, *, triangle: bool) -> bool:
    """Tell whether this kernel can add D^T X to S, and S has enough tiles to fill a GPU."""
    able = platform() in DESCRIPTORS and X.dtype in TRANSPOSABLE and all(map(describable, (S, D, X)))
    return able and tile_count(S.shape[0], S.shape[1], triangle, 128, 128) >= ENOUGH


def configuration(rows: int, d: int, triangle: bool, programs: int) -> dict[str, int]:
    """Choose the launch options with the least expected time: rounds of `programs` tiles, times the time of a tile."""

    def seconds(entry: tuple[int, dict[str, int]]) -> int:
        cost, options = entry
        tiles = tile_count(rows, d, triangle, options["BLOCK_M"], options["BLOCK_N"])
        return cost * triton.cdiv(tiles, programs)

    return min(TILES, key=seconds)[1]


@triton.jit
def _add(S, first_m, first_n, tile):
    if INTERPRET:
        # The interpreter has no bulk copies that add. It runs one program at a time, so a load and a store do the same.
        S.store([first_m, first_n], S.load([first_m, first_n]) + tile)
    else:
        S.atomic_add([first_m, first_n], tile)


@triton.jit(do_not_specialize=["tiles"], launch_metadata=metadata(cost))
def _accumulate_kernel(
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
        first, second, third, fourth = quarters(acc, BLOCK_M, BLOCK_N)
        _add(S, first_m, first_n, first)
        _add(S, first_m, first_n + BLOCK_N // 4, second)
        _add(S, first_m, first_n + BLOCK_N // 2, third)
        _add(S, first_m, first_n + BLOCK_N // 2 + BLOCK_N // 4, fourth)


def accumulate(S: Tensor, D: Tensor, X: Tensor, *, triangle: bool) -> None:
    """Add D^T X to S in place, on the current device. The caller has checked the arguments, and called `suits`.

    Args:
        S: (rows, d) fp32.
        D: (tokens, rows), bf16 or fp16.
        X: (tokens, d), dtype of D.
        triangle: whether to add only to the lower triangle of S; rows = d. Entries above it become undefined.
    """
    (tokens, d), rows, programs = X.shape, D.shape[1], multiprocessors(X.device)
    config = configuration(rows, d, triangle, programs)
    m, n, k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    tiles = tile_count(rows, d, triangle, m, n)
    _accumulate_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(S, [m, n // 4]),
        TensorDescriptor.from_tensor(D, [k, m]),
        TensorDescriptor.from_tensor(X, [k, n]),
        tokens, rows, d, tiles,
        TRIANGLE=triangle, DTYPE=TRITON_DTYPES[X.dtype], enable_fp_fusion=True, **config,
    )  # fmt: skip
