"""mirror_lower: copy the lower triangle of a square matrix to the upper triangle, in place.

    G (d, d) fp32

A Gram matrix is mirrored once, after the last call of `gram_accumulate`, which adds only to the lower triangle. On a
GPU that makes f flops in the time it takes to move a byte, the copy takes as long as `gram_accumulate` of 4 f tokens.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import triangle_tile
from .launch import FP32, check, check_matrix, on_device, platform, triangle_tiles
from .operation import Arguments, Cost, Size, metadata, operation


def reference(G: Tensor) -> Tensor:
    """Compute the operation in plain torch."""
    return G.copy_(G.tril() + G.tril(-1).T)


def cost(G: Tensor) -> Cost:
    """Read the lower triangle, and write the upper one, without the diagonal."""
    d = len(G)
    return Cost(0, d * (d - 1) * G.itemsize)


def example(size: Size) -> Arguments:
    """Make a matrix (d, d)."""
    return dict(G=size.normal(size.d, size.d))


def configuration() -> dict[str, int]:
    """Choose tile size and launch options."""
    if platform() == "interpreter":
        return dict(BLOCK=256)
    return dict(BLOCK=64, num_warps=4)


@triton.jit(launch_metadata=metadata(cost))
def _mirror_kernel(G, d, stride_gr, stride_gd, BLOCK: tl.constexpr):
    first_m, first_n = triangle_tile(tl.program_id(0), d, 1, BLOCK, BLOCK)
    offs_m = first_m + tl.arange(0, BLOCK)
    offs_n = first_n + tl.arange(0, BLOCK)
    row = offs_m.to(tl.int64)[:, None]
    column = offs_n.to(tl.int64)[None, :]
    # In tiles on the diagonal, too, only entries below the diagonal are read, and only entries above it are written.
    valid = (offs_m < d)[:, None] & (row > column)
    g = tl.load(G + row * stride_gr + column * stride_gd, mask=valid, other=0.0)
    mirror = G + tl.trans(column) * stride_gr + tl.trans(row) * stride_gd
    tl.store(mirror, tl.trans(g), mask=tl.trans(valid))


@operation(reference, cost, example, writes=("G",), tolerance=0.0)
def mirror_lower(G: Tensor) -> Tensor:
    """Copy the lower triangle of G to the upper triangle, in place.

    Args:
        G: (d, d) fp32, any strides.

    Returns:
        G.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    d = check_matrix("G", G, FP32)[1]
    check("G", G, (d, d), FP32, G)
    if d == 0:
        return G
    config = configuration()
    with on_device(G):
        _mirror_kernel[(triangle_tiles(d, config["BLOCK"], config["BLOCK"]),)](
            G, d, *G.stride(), enable_fp_fusion=True, **config
        )
    return G
