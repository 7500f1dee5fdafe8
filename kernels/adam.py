"""adam_step: make a step of Adam for the kept entries of a parameter, in place, in one pass.

    g = gradient[index];   m += 0.1 (g - m);   v += 0.001 (g^2 - v)
    weight -= rate m' / (sqrt(v') + epsilon);   W[index] = weight, rounded

    m' = m / (1 - 0.9^step),   v' = v / (1 - 0.999^step),   epsilon = 1e-16
    W, gradient (n,) floating     index (kept,) int32 or int64     weight, m, v (kept,) fp32

The step is memory-bound. If two of five entries are kept, nearly every sector of memory has a kept entry. So all of the
gradient is read, and all of W is read and written. The same step in operations of torch moves 2.4 times the bytes:
separate passes gather, widen, narrow and scatter the entries, with an index in int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import steps
from .definitions import ADAM_EPSILON, DECAYS
from .device import cast
from .launch import FLOATS, check_rows, on_device, platform, warps
from .operation import ALL, Arguments, Cost, Size, launch, metadata, operation


def reference(
    W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor, m: Tensor, v: Tensor, *, rate: float, step: int
) -> None:
    """Compute the operation in plain torch."""
    (beta, gamma), g = DECAYS, gradient[index].to(m.dtype)
    m.copy_(beta * m + (1 - beta) * g)
    v.copy_(gamma * v + (1 - gamma) * g**2)
    weight -= rate * (m / (1 - beta**step)) / ((v / (1 - gamma**step)).sqrt() + ADAM_EPSILON)
    W[index] = weight.to(W.dtype)


def cost(W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor) -> Cost:
    """Read and write weight, m, v and all of W, and read the index and all of the gradient."""
    kept = len(index)
    return Cost(12 * kept, kept * (index.itemsize + 6 * weight.itemsize) + gradient.nbytes + 2 * W.nbytes)


def example(size: Size, *, index: torch.dtype = torch.int32) -> Arguments:
    """Make the third step of two of five entries of a weight."""
    W, gradient = (size.weight(seed=seed).flatten() for seed in range(2))
    place = torch.arange(size.rows * int(0.4 * size.d), dtype=index, device=size.device) * 5 // 2
    weight = W[place].float()
    means = dict(m=0.1 * weight, v=weight.square())
    return dict(W=W, gradient=gradient, index=place, weight=weight, **means, rate=0.01, step=3)


@triton.jit(launch_metadata=metadata(cost))
def _adam_kernel(
    W, GRADIENT, INDEX, WEIGHT, M, V, kept, share_m, share_v, rate, root, epsilon, BLOCK: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = entry < kept
    place = tl.load(INDEX + entry, mask=valid, other=0).to(tl.int64)
    m = tl.load(M + entry, mask=valid, other=0.0)
    v = tl.load(V + entry, mask=valid, other=0.0)
    g = tl.load(GRADIENT + place, mask=valid, other=0.0).to(m.dtype)
    m += share_m * (g - m)
    v += share_v * (g * g - v)
    w = tl.load(WEIGHT + entry, mask=valid, other=0.0) - rate * m / (tl.sqrt(v) * root + epsilon)
    tl.store(M + entry, m, mask=valid)
    tl.store(V + entry, v, mask=valid)
    tl.store(WEIGHT + entry, w, mask=valid)
    tl.store(W + place, cast(w, W.dtype.element_ty), mask=valid)


# `steps.adam_step` is torch's fused step between a gather and a scatter. The result has no rounded W.
@operation(
    reference, cost, example, writes=("W", "weight", "m", "v"), library=steps.adam_step,
    result=lambda arguments, _: tuple(arguments[name] for name in ("weight", "m", "v")),
    launches=(launch(ALL, dtype=torch.float32, index=torch.int64),),
)  # fmt: skip
def adam_step(
    W: Tensor, gradient: Tensor, index: Tensor, weight: Tensor, m: Tensor, v: Tensor, *, rate: float, step: int
) -> None:
    """Make a step of Adam for the kept entries of W. All tensors are contiguous.

    Args:
        W: (n,), fp32 / bf16 / fp16 / fp64; the entries at `index` are overwritten.
        gradient: (n,), in the dtype of W.
        index: (kept,) int32 or int64 positions of the kept entries, each at most once.
        weight: (kept,) the kept entries without rounding, updated in place; fp32, or fp64 if W is fp64.
        m, v: (kept,), in the dtype of `weight`: running means of the gradient and of its square, updated in place; 0
            before the first step.
        rate: learning rate.
        step: number of the step, from 1.

    Raises:
        ValueError, TypeError: an argument does not fit this description.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    check_rows((W.numel(),), W, (*FLOATS, torch.float64), W=W)
    check_rows(W.shape, W, (W.dtype,), gradient=gradient)
    check_rows((len(index),), W, (torch.int32, torch.int64), index=index)
    check_rows(index.shape, W, (wide,), weight=weight, m=m, v=v)
    if not len(index):
        return
    BLOCK = min(triton.next_power_of_2(len(index)), 1 << 18) if platform() == "interpreter" else 1024
    decay_m, decay_v = DECAYS
    with on_device(W):
        _adam_kernel[(triton.cdiv(len(index), BLOCK),)](
            W, gradient, index, weight, m, v, kept=len(index), share_m=1 - decay_m,
            share_v=1 - decay_v, rate=rate / (1 - decay_m**step), root=(1 - decay_v**step) ** -0.5,
            epsilon=ADAM_EPSILON, enable_fp_fusion=True, BLOCK=BLOCK, num_warps=warps(4),
        )  # fmt: skip
