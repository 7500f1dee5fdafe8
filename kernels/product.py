"""product: multiply U = E G, the one matrix product of a Frank-Wolfe step.

    E (rows, d) fp32 / bf16 / fp16     G (d, d) symmetric, fp32 or bf16     U (rows, d) fp32

    flops = 2 rows d^2
    bytes = rows d size(E) + d^2 size(G) + 4 rows d       (each operand once; + 4 rows d to add to what U holds)

There are two kernels. The first runs on sm_90 and later, if large tiles fill the GPU, tensor cores multiply and rows
are 16-byte aligned. It launches a program for each multiprocessor, and the programs walk the tiles. Bulk copies through
tensor descriptors load both operands, so no thread computes an address or masks an edge, and the stores of a tile
overlap with the loads of the next one. In all other cases every program computes one tile, and its threads load through
pointers, ahead of the dot.

Sums are accumulated in fp32. `precision` says how operands are multiplied: "ieee" multiplies in fp32, without tensor
cores for fp32 operands; "tf32x3" splits each operand into two tf32 numbers and multiplies three times, within 2^-21;
"tf32" lets the tensor cores read the upper 19 bits; "bf16" rounds each tile to bf16 when it is loaded. Products of bf16
operands are exact at any precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .definitions import check_precision
from .device import dot, grouped_tile, quarters
from .launch import FLOATS, check, check_matrix, describable, multiprocessors, on_device, platform, vectorized

# Targets on which bulk copies load tiles.
DESCRIPTORS = ("sm_90", "interpreter")

# Bytes of shared memory for the stages of a program. Of the targets that count as sm_80, sm_86, sm_89 and sm_120 have
# the least shared memory, 99 KiB.
PIPELINE = {"sm_80": 96 << 10, "sm_90": 192 << 10}

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def configuration(
    rows: int, d: int, size: int, *, described: bool, vectors: bool, stored: tuple[int, int], split: bool
) -> dict[str, int]:
    """Choose tile sizes and launch options.

    Args:
        rows, d: shape of the output.
        size: bytes of an entry of the dot's operands.
        described: whether bulk copies can load the operands.
        vectors: whether threads load several entries of both operands at once, see `launch.vectorized`.
        stored: bytes of an entry of each operand in memory.
        split: whether each operand is split into two parts, which need more registers.
    """
    where = platform()
    if where == "interpreter":
        # In the interpreter programs and steps cost more than entries.
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8)
    tiles = triton.cdiv(rows, 128) * triton.cdiv(d, 128)
    # A step reads 128 bytes of each row. On AMD it reads half of that, to fit into 64 KiB of shared memory.
    BLOCK_K = 128 // size
    if rows <= 64 or tiles < 128 or (split and not vectors):
        # There are too few large tiles to fill a GPU, or large tiles spill. Each entry with a load of its own needs an
        # address, in two registers of a thread: then 64 x 64 tiles spill as well, unless 8 warps share them.
        BLOCK_M, BLOCK_N, num_warps, most = 64, 64, 4 if vectors else 8, 4
    elif where == "hip":
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, most = 128, 128, BLOCK_K // 2, 4, 2
    elif described and tiles >= 256:
        # For a flop, 128 x 256 tiles read three quarters of the bytes of 128 x 128 tiles. Four stages and a quarter of
        # the output fill shared memory. Only bulk copies leave enough registers for the sums: loads through pointers
        # spill.
        BLOCK_M, BLOCK_N, num_warps, most = 128, 256, 8, 4
    elif split or not (described or vectors):
        # Half of BLOCK_K halves a thread's addresses. Tiles of 64 x 64 would load twice the entries for a flop, one by
        # one.
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, most = 128, 128, BLOCK_K // 2, 8, 3
    else:
        BLOCK_M, BLOCK_N, num_warps, most = 128, 128, 8, 3
    stages = 2
    if where != "hip":
        # The number of stages that fit shared memory: fewer for operands of 4 bytes that are rounded to 2 after the
        # load. mma.sync reads its operands to registers, and needs one buffer less than there are stages.
        fit = PIPELINE[where] // ((BLOCK_M * stored[0] + BLOCK_N * stored[1]) * BLOCK_K)
        stages = min(most, fit + (where == "sm_80"))
    tile = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    return tile | dict(GROUP_M=8, num_warps=num_warps, num_stages=stages)


@triton.jit
def _store(U, acc, offs_m, offs_n, rows, d, stride_ur, stride_ud, ADD: tl.constexpr):
    valid = (offs_m < rows)[:, None] & (offs_n < d)[None, :]
    row = offs_m.to(tl.int64)[:, None]
    column = offs_n.to(tl.int64)[None, :]
    ptrs = U + row * stride_ur + column * stride_ud
    if ADD:
        acc += tl.load(ptrs, mask=valid, other=0.0)
    tl.store(ptrs, acc, mask=valid)


@triton.jit
def _product_kernel(
    E, G, U, rows, d, stride_er, stride_ed, stride_gr, stride_gd, stride_ur, stride_ud,
    ADD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_m, first_n = grouped_tile(tl.program_id(0), rows, d, GROUP_M, BLOCK_M, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # Rows past the edge read the last row again. They are never stored, so the loads need no mask for them.
    row = tl.minimum(offs_m, rows - 1).to(tl.int64)[:, None]
    column = tl.minimum(offs_n, d - 1).to(tl.int64)
    k = offs_k.to(tl.int64)
    e_ptrs = E + row * stride_er + k[None, :] * stride_ed
    # G is symmetric, so row n is read for column n: it is contiguous along k, as E is, and as wgmma needs fp32
    # operands. Tiles that are read along n would be transposed through registers (206 in place of 182 for tf32 on
    # sm_90).
    g_ptrs = G + column[None, :] * stride_gr + k[:, None] * stride_gd
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, d, BLOCK_K):
        valid_k = offs_k < d - start
        e = tl.load(e_ptrs, mask=valid_k[None, :], other=0.0)
        g = tl.load(g_ptrs, mask=valid_k[:, None], other=0.0)
        acc = dot(e, g, acc, DTYPE, PRECISION)
        e_ptrs += BLOCK_K * stride_ed
        g_ptrs += BLOCK_K * stride_gd
    _store(U, acc, offs_m, offs_n, rows, d, stride_ur, stride_ud, ADD)


@triton.jit
def _descriptor_kernel(
    E, G, U, rows, d, stride_ur, stride_ud,
    ADD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(d, BLOCK_N)
    # In a flattened loop the loads of the next tile start while this one is stored.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_m, first_n = grouped_tile(tile, rows, d, GROUP_M, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_K):
            e = E.load([first_m, start])
            # Row n of the symmetric G is read for column n. Entries past the edges read as 0.
            g = G.load([first_n, start])
            acc = dot(e, g.T, acc, DTYPE, PRECISION)
        # A tile passes through shared memory on its way to memory. It goes in quarters, since the operands of the next
        # tile fill the rest.
        offs_m = first_m + tl.arange(0, BLOCK_M)
        first, second, third, fourth = quarters(acc, BLOCK_M, BLOCK_N)
        offs_n = first_n + tl.arange(0, BLOCK_N // 4)
        _store(U, first, offs_m, offs_n, rows, d, stride_ur, stride_ud, ADD)
        _store(U, second, offs_m, offs_n + BLOCK_N // 4, rows, d, stride_ur, stride_ud, ADD)
        _store(U, third, offs_m, offs_n + BLOCK_N // 2, rows, d, stride_ur, stride_ud, ADD)
        _store(U, fourth, offs_m, offs_n + BLOCK_N // 2 + BLOCK_N // 4, rows, d, stride_ur, stride_ud, ADD)


def dot_options(operands: tuple[torch.dtype, ...], precision: str) -> dict[str, object]:
    """Choose DTYPE and PRECISION of `device.dot` for operands of these dtypes.

    Raises:
        ValueError: the precision is unknown.
    """
    check_precision(precision)
    if precision == "bf16" or all(dtype == torch.bfloat16 for dtype in operands):
        return dict(DTYPE=tl.bfloat16, PRECISION="ieee")
    if precision == "tf32x3" and platform() == "hip":
        # AMD's matrix cores multiply fp32 without rounding.
        precision = "ieee"
    return dict(DTYPE=tl.float32, PRECISION=precision)


def _launch(E: Tensor, G: Tensor, out: Tensor, add: bool, options: dict[str, object]) -> None:
    """Launch a product on the current device. No operand is empty."""
    rows, d = out.shape
    low = options["DTYPE"] == tl.bfloat16
    split = options["PRECISION"] == "tf32x3"
    whole = low or options["PRECISION"] == "tf32"
    described = platform() in DESCRIPTORS and whole and describable(E) and describable(G)
    config = configuration(
        rows, d, 2 if low else 4, described=described, vectors=vectorized(E) and vectorized(G),
        stored=(E.element_size(), G.element_size()), split=split,
    )  # fmt: skip
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"])
    if described and config["BLOCK_N"] > 64:
        _descriptor_kernel[(min(tiles, multiprocessors(E.device)),)](
            E=TensorDescriptor.from_tensor(E, [config["BLOCK_M"], config["BLOCK_K"]]),
            G=TensorDescriptor.from_tensor(G, [config["BLOCK_N"], config["BLOCK_K"]]),
            U=out, rows=rows, d=d, stride_ur=out.stride(0), stride_ud=out.stride(1),
            ADD=add, enable_fp_fusion=True, **options, **config,
        )  # fmt: skip
        return
    _product_kernel[(tiles,)](
        E=E, G=G, U=out, rows=rows, d=d,
        stride_er=E.stride(0), stride_ed=E.stride(1), stride_gr=G.stride(0), stride_gd=G.stride(1),
        stride_ur=out.stride(0), stride_ud=out.stride(1), ADD=add,
        enable_fp_fusion=True, **options, **config,
    )  # fmt: skip


def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """Multiply E G, accumulated in fp32.

    Args:
        E: (rows, d), fp32 / bf16 / fp16, any strides.
        G: (d, d), symmetric, fp32 or bf16.
        precision: rounding of both operands, one of PRECISIONS.
        out: (rows, d) fp32, written and returned; allocated when None.
        add: whether to add the product to the content of `out`.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("E", E, FLOATS)
    check("G", G, (d, d), (torch.float32, torch.bfloat16), E)
    if out is None:
        out = torch.empty(rows, d, dtype=torch.float32, device=E.device)
        if add:
            raise ValueError("add: needs out")
    check("out", out, (rows, d), (torch.float32,), E)
    # The platform of the current device decides what is launched.
    with on_device(E):
        options = dot_options((E.dtype, G.dtype), precision)
        if out.numel():
            _launch(E, G, out, add, options)
    return out


def product_transposed(E: Tensor, C: Tensor, *, precision: str = "ieee") -> Tensor:
    """Multiply E C^T, accumulated in fp32.

    The kernels of `product` read row n of their matrix for column n of the output. For any matrix that is this product.
    """
    return product(E, C, precision=precision)
