"""conjugate_step: make a step of conjugate gradients except for its product, in place. A program works on a few rows.

    a  = rz / <P, U>                             0 in a converged row, where rz <= enough
    Z += a P                                     R -= a U
    r  = mask * R     z = r inverse              rz' = <r, z>
    P  = z + (rz' / rz) P                        the caller computes U, the product of P

    Z, R, U (rows, d) fp32     P (rows, d) fp32 / bf16     mask (rows, d) bool
    inverse (d,) fp32     rz, enough (rows,) fp32

A row that fits one chunk stays in registers from the first load to the last store. A longer row takes three passes over
its chunks: A sums <P, U>, B updates Z and R and sums rz', C writes the next P. B begins where A ended, and C where B
ended, since the cache still holds the chunks that were read last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .definitions import CONVERGED
from .device import columns, load, store
from .launch import (
    BOOL,
    FP32,
    check_matrix,
    check_rows,
    interpreter_tile,
    launch_rows,
    platform,
    row_strides,
    warps,
)
from .operation import ALL, HOPPER, NVIDIA, Arguments, Cost, Size, launch, metadata, operation


def reference(
    Z: Tensor,
    R: Tensor,
    P: Tensor,
    U: Tensor,
    rz: Tensor,
    enough: Tensor,
    inverse: Tensor,
    *,
    mask: Tensor | None = None,
    first: bool = False,
    last: bool = False,
) -> None:
    """Compute the operation in plain torch."""
    before, p, pu = rz.clone(), P.to(Z.dtype), (P * U).sum(1)
    if not first:
        # A ratio is 0 where its denominator is not positive, since such a row has converged.
        a = torch.where((pu > 0) & (before > enough), before / pu, 0)[:, None]
        Z += a * p
        R -= a * U
    if last:
        return
    r = R if mask is None else R.masked_fill(~mask, 0)
    z = r * inverse
    rz.copy_((r * z).sum(1))
    if first:
        P.copy_(z)
        enough.copy_(CONVERGED * rz)
    else:
        P.copy_(z + torch.where(before > 0, rz / before, 0)[:, None] * p)


def cost(Z: Tensor, P: Tensor, mask: Tensor | None = None, first: bool = False, last: bool = False) -> Cost:
    """Read P, U, Z, R and the mask, and write Z, R, P.

    The first call reads R and the mask, and writes P. The last call neither reads the mask nor writes P.
    """
    parts, read = 2 - first - last, mask is not None and not last
    return Cost(6 * parts * Z.numel(), Z.numel() * (Z.itemsize * (1 if first else 5) + parts * P.itemsize + read))


def example(size: Size, **place: bool) -> Arguments:
    """Make the middle of a descent, or with `first` or `last` its first or last call. P is in `size.dtype`."""
    Z, R, P, G = size.matrix(), size.matrix(seed=1), size.weight(seed=2), size.gram()
    mask, inverse = size.mask(seed=3), 1 / G.diagonal()
    rz = (R.square() * inverse).sum(1)
    return dict(Z=Z, R=R, P=P, U=P.float() @ G, rz=rz, enough=CONVERGED * rz, inverse=inverse, mask=mask, **place)


def configuration(rows: int, d: int) -> dict[str, int]:
    """Choose tile sizes and launch options, with chunks of up to 8192 columns."""
    width = triton.next_power_of_2(d)
    if platform() == "interpreter":
        return interpreter_tile(rows, width)
    if width <= 2048:
        # A thread has 4 entries of each matrix. With 8 or 16 some versions of Triton spill a few registers.
        return dict(BLOCK_R=max(1, 1024 // width), BLOCK_D=width, num_warps=warps(max(8, width // 128)))
    if width <= 8192:
        # A thread has 16 entries of each matrix.
        return dict(BLOCK_R=1, BLOCK_D=width, num_warps=warps(width // 512))
    # With 32 warps a multiprocessor works on one long row at a time, and the cache holds more of each row.
    return dict(BLOCK_R=1, BLOCK_D=8192, num_warps=warps(32))


@triton.jit
def _ratio(numerator, denominator):
    return tl.where(denominator > 0, numerator / tl.where(denominator > 0, denominator, 1.0), 0.0)


@triton.jit
def _move(Z, R, column, valid, p, u, a):
    """Update one chunk, Z += a p and R -= a u; return the new R."""
    z = load(Z, column, valid)
    r = load(R, column, valid)
    r -= a[:, None] * u
    store(Z, column, z + a[:, None] * p, valid)
    store(R, column, r, valid)
    return r


@triton.jit
def _preconditioned(INVERSE, MASK, r, column, valid, valid_d):
    """Return the masked r, and its product with the preconditioner."""
    if MASK is not None:
        r = tl.where(load(MASK, column, valid).to(tl.int1), r, 0.0)
    return r, r * tl.load(INVERSE + column, mask=valid_d, other=0.0)[None, :]


@triton.jit(launch_metadata=metadata(cost))
def _conjugate_kernel(
    Z, R, P, U, RZ, ENOUGH, INVERSE, MASK, converged, rows, d,
    stride_z, stride_r, stride_p, stride_u, stride_m,
    FIRST: tl.constexpr, LAST: tl.constexpr, ONE_CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    Z += row[:, None] * stride_z
    R += row[:, None] * stride_r
    P += row[:, None] * stride_p
    U += row[:, None] * stride_u
    if MASK is not None:
        MASK += row[:, None] * stride_m
    before = tl.zeros((BLOCK_R,), tl.float32)
    if not FIRST:
        before = tl.load(RZ + row, mask=valid_r, other=0.0)
        enough = tl.load(ENOUGH + row, mask=valid_r, other=0.0)

    if ONE_CHUNK:
        column, valid_d, valid = columns(0, d, valid_r, BLOCK_D)
        if FIRST:
            r = load(R, column, valid)
        else:
            p = load(P, column, valid).to(tl.float32)
            u = load(U, column, valid)
            a = tl.where(before <= enough, 0.0, _ratio(before, tl.sum(p * u, axis=1)))
            r = _move(Z, R, column, valid, p, u, a)
        if not LAST:
            r, z = _preconditioned(INVERSE, MASK, r, column, valid, valid_d)
            rz = tl.sum(r * z, axis=1)
            if not FIRST:
                z += _ratio(rz, before)[:, None] * p
            store(P, column, z, valid)
    else:
        if not FIRST:
            # Pass A: the step size.
            products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            for start in range(0, d, BLOCK_D):
                column, valid_d, valid = columns(start, d, valid_r, BLOCK_D)
                p = load(P, column, valid).to(tl.float32)
                products += p * load(U, column, valid)
            a = tl.where(before <= enough, 0.0, _ratio(before, tl.sum(products, axis=1)))

        # Pass B: the move, and <r, z> of the next direction.
        products_rz = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for back in range(0, d, BLOCK_D):
            column, valid_d, valid = columns((d - 1) // BLOCK_D * BLOCK_D - back, d, valid_r, BLOCK_D)
            if FIRST:
                r = load(R, column, valid)
            else:
                p = load(P, column, valid).to(tl.float32)
                u = load(U, column, valid)
                r = _move(Z, R, column, valid, p, u, a)
            if not LAST:
                r, z = _preconditioned(INVERSE, MASK, r, column, valid, valid_d)
                products_rz += r * z
        rz = tl.sum(products_rz, axis=1)

        if not LAST:
            # Pass C reads entries of R that another thread may have stored in pass B, and Triton adds no barrier.
            tl.debug_barrier()
            # Pass C: the direction.
            for start in range(0, d, BLOCK_D):
                column, valid_d, valid = columns(start, d, valid_r, BLOCK_D)
                r = load(R, column, valid)
                r, z = _preconditioned(INVERSE, MASK, r, column, valid, valid_d)
                if not FIRST:
                    p = load(P, column, valid).to(tl.float32)
                    z += _ratio(rz, before)[:, None] * p
                store(P, column, z, valid)

    if not LAST:
        tl.store(RZ + row, rz, mask=valid_r)
        if FIRST:
            tl.store(ENOUGH + row, converged * rz, mask=valid_r)


# The tolerance is that of P in bf16.
@operation(
    reference, cost, example, writes=("Z", "R", "P", "rz", "enough"), tolerance=2.0**-8,
    launches=(
        launch(NVIDIA, d=1536), launch(ALL, d=14336), launch(HOPPER, d=14336, dtype=torch.float32),
        *(launch(HOPPER, d=d, first=True) for d in (4096, 14336)),
        *(launch(HOPPER, d=d, last=True) for d in (4096, 14336)),
    ),
)  # fmt: skip
def conjugate_step(
    Z: Tensor,
    R: Tensor,
    P: Tensor,
    U: Tensor,
    rz: Tensor,
    enough: Tensor,
    inverse: Tensor,
    *,
    mask: Tensor | None = None,
    first: bool = False,
    last: bool = False,
) -> None:
    """Make a step of conjugate gradients except for its product, in place.

    Args:
        Z, R, U: (rows, d) fp32 with contiguous rows (column stride 1): solution, residual, and product of P.
        P: (rows, d) fp32 or bf16 with contiguous rows: the search direction.
        rz, enough: (rows,) fp32, contiguous: <r, z>, and the value of it at which a row has converged.
        inverse: (d,) fp32, contiguous: the preconditioner.
        mask: (rows, d) bool with contiguous rows, True for entries of Z that change; None: all of them.
        first: whether this is the call before the first product. It writes P, rz and enough, leaves Z and R unchanged,
            and does not read U.
        last: whether this is the call after the last product. It updates Z and R, and leaves P, rz and enough
            unchanged.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    rows, d = check_matrix("Z", Z, FP32)
    check_rows((rows, d), Z, FP32, Z=Z, R=R, U=U)
    check_rows((rows, d), Z, (torch.float32, torch.bfloat16), P=P)
    check_rows((rows, d), Z, BOOL, mask=mask)
    check_rows((rows,), Z, FP32, rz=rz, enough=enough)
    check_rows((d,), Z, FP32, inverse=inverse)
    if Z.numel() == 0:
        return
    config = configuration(rows, d)
    launch_rows(
        _conjugate_kernel, config, Z, R, P, U, rz, enough, inverse, mask, CONVERGED,
        d=d, **row_strides(z=Z, r=R, p=P, u=U, m=mask),
        FIRST=first, LAST=last, ONE_CHUNK=config["BLOCK_D"] >= d,
    )  # fmt: skip
