"""product: compute U = E G, the only matrix product of a Frank-Wolfe step.

    E (rows, d) fp32 / bf16 / fp16     G (d, d) symmetric, fp32 or bf16     U (rows, d) fp32

There are two kernels. One runs on sm_90 and later, except sm_120, in bf16 or tf32, if large tiles fill the GPU and rows
are aligned to 16 bytes. It launches a program on each multiprocessor, and each program computes several tiles. Bulk
copies through tensor descriptors load both operands, so no thread computes an address or masks an edge. The stores of a
tile overlap with the loads of the next tile. In all other cases the other kernel runs: every program computes one tile,
and its threads load operands through pointers, ahead of the dot.

Sums are accumulated in fp32. `precision` says how operands are multiplied: "ieee" multiplies in fp32, without tensor
cores for fp32 operands; "tf32x3" splits each operand into two tf32 values and multiplies three times, within 2^-21;
"tf32" lets the tensor cores read the upper 19 bits; "bf16" rounds each tile to bf16 when it is loaded. Products of bf16
operands are exact at any precision.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .definitions import PRECISIONS, check_precision, round_operand
from .device import dot, grouped_tile, quarters
from .launch import FLOATS, check, check_matrix, describable, multiprocessors, on_device, platform, vectorized
from .operation import ALL, HOPPER, NVIDIA, Arguments, Cost, Size, launch, metadata, operation

# Targets on which bulk copies load tiles.
DESCRIPTORS = ("sm_90", "interpreter")

# Bytes of shared memory for the stages of a program. For "sm_80" they fit the 99 KiB of sm_86, sm_89 and sm_120, which
# run the same code with the least shared memory.
PIPELINE = {"sm_80": 96 << 10, "sm_90": 192 << 10}

FP32 = torch.float32
TRITON_DTYPES = {FP32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def reference(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """Compute the operation in plain torch."""
    U = round_operand(E, precision) @ round_operand(G, precision)
    if out is None:
        return U
    return out.add_(U) if add else out.copy_(U)


def cost(E: Tensor, G: Tensor, precision: str = "ieee", add: bool = False, dtype: object = None) -> Cost:
    """Read E and G, and write U; with `add` read it, too. `dtype` is a kernel's DTYPE.

    At "tf32x3" three products in tf32 replace one.
    """
    rows, d = E.shape
    if dtype == tl.bfloat16 or E.dtype == G.dtype == torch.bfloat16:
        precision = "bf16"
    times, unit = (3, "tf32") if precision == "tf32x3" else (1, precision)
    return Cost(times * 2 * rows * d * d, E.nbytes + G.nbytes + 4 * rows * d * (1 + add), unit)


def example(size: Size, *, precision: str = "bf16", right: torch.dtype | None = None, add: bool = False) -> Arguments:
    """Make the operands of a solve. `right` is another dtype of G."""
    G = size.gram().to(right or (torch.bfloat16 if precision == "bf16" else FP32))
    return dict(E=size.weight(), G=G, precision=precision, out=size.matrix(seed=1), add=add)


# Convert an operand once for many calls of `library`, so that their times are those of the product alone.
_converted = lru_cache(maxsize=2)(Tensor.to)


def library(E: Tensor, G: Tensor, *, precision: str, out: Tensor, transposed: bool = False, **_: bool) -> Tensor:
    """Write E G, or E^T G if `transposed`, to `out` by the product of torch's library, which is cuBLAS on a GPU.

    E is converted to the dtype of G. On a CPU both are converted to fp32, since its library would round a product of
    16-bit operands. At "tf32x3" the library multiplies in fp32.
    """
    dtype = G.dtype if G.is_cuda else FP32
    options: Arguments = {} if dtype == FP32 else dict(out_dtype=FP32)
    E, G = _converted(E, dtype), _converted(G, dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        return torch.mm(E.T if transposed else E, G, out=out, **options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def configuration(
    rows: int, d: int, size: int, *, described: bool, vectors: bool, stored: tuple[int, int], split: bool
) -> dict[str, int]:
    """Choose tile sizes and launch options.

    Args:
        rows, d: shape of the output.
        size: bytes of an entry of the operands in the dot.
        described: whether bulk copies can load the operands.
        vectors: whether a thread can load several entries of each operand by one instruction, see `launch.vectorized`.
        stored: bytes of an entry of E and of G in memory.
        split: whether each operand is split into two parts, which takes more registers.
    """
    target = platform()
    if target == "interpreter":
        # In the interpreter, time grows with programs and steps more than with entries.
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, GROUP_M=8)
    tiles = triton.cdiv(rows, 128) * triton.cdiv(d, 128)
    # A step reads 128 bytes of each row. For the large tiles on AMD it reads half, to fit into 64 KiB of shared memory.
    BLOCK_K = 128 // size
    if rows <= 64 or tiles < 128 or (split and not vectors):
        # Large tiles are too few to fill a GPU, or they would spill. Without `vectors` each entry needs an address, in
        # two registers of a thread, and 64 x 64 tiles would spill as well, unless 8 warps share the addresses.
        BLOCK_M, BLOCK_N, num_warps, most = 64, 64, 4 if vectors else 8, 4
    elif target == "hip":
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, most = 128, 128, BLOCK_K // 2, 4, 2
    elif described and tiles >= 256:
        # For each flop, 128 x 256 tiles read three quarters of the bytes that 128 x 128 tiles read. Four stages and a
        # quarter of the output fill shared memory. Only bulk copies leave enough registers for the sums: with loads
        # through pointers such tiles spill.
        BLOCK_M, BLOCK_N, num_warps, most = 128, 256, 8, 4
    elif split or not (described or vectors):
        # Half of BLOCK_K needs half of the addresses in a thread. Tiles of 64 x 64 would load twice the entries for
        # each flop, one by one.
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps, most = 128, 128, BLOCK_K // 2, 8, 3
    else:
        BLOCK_M, BLOCK_N, num_warps, most = 128, 128, 8, 3
    stages = 2
    if target != "hip":
        # As many stages as fit shared memory: fewer if operands of 4 bytes are rounded to 2 bytes after the load. On
        # sm_80 mma.sync reads its operands from registers, so a program needs one buffer less than it has stages.
        fit = PIPELINE[target] // ((BLOCK_M * stored[0] + BLOCK_N * stored[1]) * BLOCK_K)
        stages = min(most, fit + (target == "sm_80"))
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


@triton.jit(launch_metadata=metadata(cost))
def _product_kernel(
    E, G, U, rows, d, stride_er, stride_ed, stride_gr, stride_gd, stride_ur, stride_ud,
    ADD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_m, first_n = grouped_tile(tl.program_id(0), rows, d, GROUP_M, BLOCK_M, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # Indices past the edge are clamped, and read the last row again. These sums are not stored, so loads need no mask.
    row = tl.minimum(offs_m, rows - 1).to(tl.int64)[:, None]
    column = tl.minimum(offs_n, d - 1).to(tl.int64)
    k = offs_k.to(tl.int64)
    e_ptrs = E + row * stride_er + k[None, :] * stride_ed
    # G is symmetric, so row n is read in place of column n. Row n is contiguous along k, like a row of E, and like
    # wgmma needs its fp32 operands. Tiles that are read along n would be transposed through registers (206 in place of
    # 182 for tf32 on sm_90).
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


@triton.jit(launch_metadata=metadata(cost))
def _descriptor_kernel(
    E, G, U, rows, d, stride_ur, stride_ud,
    ADD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(d, BLOCK_N)
    # In a flattened loop the loads of the next tile start while this tile is stored.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_m, first_n = grouped_tile(tile, rows, d, GROUP_M, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_K):
            e = E.load([first_m, start])
            # G is symmetric, so row n is read in place of column n. Entries past the edges read as 0.
            g = G.load([first_n, start])
            acc = dot(e, g.T, acc, DTYPE, PRECISION)
        # A tile passes through shared memory on its way to global memory. It goes in quarters, since the operands of
        # the next tile fill the rest of shared memory.
        parts = quarters(acc, BLOCK_M, BLOCK_N)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        for n in tl.static_range(4):
            offs_n = first_n + n * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            _store(U, parts[n], offs_m, offs_n, rows, d, stride_ur, stride_ud, ADD)


def dot_options(operands: tuple[torch.dtype, ...], precision: str) -> dict[str, object]:
    """Choose DTYPE and PRECISION of `device.dot` for operands of these dtypes.

    Raises:
        ValueError: the precision is unknown.
    """
    check_precision(precision)
    if precision == "bf16":
        return dict(DTYPE=tl.bfloat16, PRECISION="ieee")
    if operands[0] == operands[1] != FP32:
        return dict(DTYPE=TRITON_DTYPES[operands[0]], PRECISION="ieee")
    if platform() == "hip":
        # AMD's matrix cores multiply fp32 without rounding. Of its GPUs Triton compiles tf32 for gfx942 alone.
        precision = "ieee"
    return dict(DTYPE=tl.float32, PRECISION=precision)


def _launch(E: Tensor, G: Tensor, out: Tensor, add: bool, options: dict[str, object]) -> None:
    """Launch the product of operands that are not empty, on the current device."""
    rows, d = out.shape
    low = options["DTYPE"] == tl.bfloat16
    unsplit = low or options["PRECISION"] == "tf32"
    # Exact products of fp32 and bf16 would spill in larger tiles than split ones without `vectors` have.
    mixed = not unsplit and E.itemsize > G.itemsize
    split = options["PRECISION"] == "tf32x3" or mixed
    described = platform() in DESCRIPTORS and unsplit and describable(E) and describable(G)
    config = configuration(
        rows, d, 2 if low else 4, described=described, vectors=vectorized(E) and vectorized(G) and not mixed,
        stored=(E.itemsize, G.itemsize), split=split,
    )  # fmt: skip
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"])
    if described and config["BLOCK_N"] > 64:
        _descriptor_kernel[(min(tiles, multiprocessors(E.device)),)](
            TensorDescriptor.from_tensor(E, [config["BLOCK_M"], config["BLOCK_K"]]),
            TensorDescriptor.from_tensor(G, [config["BLOCK_N"], config["BLOCK_K"]]),
            out, rows, d, *out.stride(), ADD=add, enable_fp_fusion=True, **options, **config,
        )  # fmt: skip
        return
    _product_kernel[(tiles,)](
        E, G, out, rows, d, *E.stride(), *G.stride(), *out.stride(),
        ADD=add, enable_fp_fusion=True, **options, **config,
    )  # fmt: skip


@operation(
    reference, cost, example, settings={p: dict(precision=p) for p in PRECISIONS}, writes=("out",), tolerance=None,
    library=library,
    launches=(
        launch(ALL, add=True),
        launch(HOPPER, 576, 576, add=True),
        # Rows may have targets, which are fp32.
        *(launch(ALL, dtype=FP32, precision=precision) for precision in PRECISIONS),
        # A solve does not have these operands, but any caller may.
        launch(ALL, dtype=FP32, right=FP32),
        launch(ALL, dtype=FP32, right=torch.bfloat16, precision="ieee"),
        launch(NVIDIA, 576, 576, dtype=FP32, right=FP32),
        # Rows are not aligned for bulk copies.
        launch(NVIDIA, d=4100),
        launch(NVIDIA, d=4100, dtype=FP32, precision="tf32x3"),
    ),
)  # fmt: skip
def product(E: Tensor, G: Tensor, *, precision: str = "ieee", out: Tensor | None = None, add: bool = False) -> Tensor:
    """Compute E G, accumulated in fp32. If G is not symmetric, the result is E G^T, see the kernels.

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
    check("G", G, (d, d), (FP32, torch.bfloat16), E)
    if out is None:
        out = torch.empty(rows, d, dtype=FP32, device=E.device)
        if add:
            raise ValueError("add: has nothing to add to; pass out")
    check("out", out, (rows, d), (FP32,), E)
    # `dot_options` and `_launch` depend on the current device.
    with on_device(E):
        options = dot_options((E.dtype, G.dtype), precision)
        if out.numel():
            _launch(E, G, out, add, options)
    return out
