"""Compute with bool matrices in plain torch, fast on a CPU and on a GPU.

On a CPU torch has vector instructions for arithmetic, but not for operations that mix bool and floating tensors:
`masked_fill`, comparisons, and products with a bool tensor take 5 to 40 times as long as a product of floating tensors.
So these functions compute with the bytes of bool tensors, and compare in numpy.
"""

import numpy as np
import torch
from torch import Tensor

# The integers by their bytes.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_float(kept: Tensor) -> Tensor:
    """Convert a bool matrix to fp32, with 1 for True and 0 for False."""
    return kept.view(torch.uint8).float()


def masked(X: Tensor, kept: Tensor) -> Tensor:
    """Set X to 0 where `kept` is False; returns (rows, d) in the dtype of X."""
    if X.device.type != "cpu":
        return torch.where(kept, X, 0)
    bits = BITS[X.dtype.itemsize]
    # All bits of -1 are set, and no bit of 0 is set.
    return kept.view(torch.int8).neg().to(bits).bitwise_and_(X.view(bits)).view(X.dtype)


def infinite(chosen: Tensor) -> Tensor:
    """Return inf where `chosen` is True, else -inf, fp32. Its maximum with X is X with inf at the chosen entries."""
    return as_float(chosen).sub_(0.5).mul_(torch.inf)


def at_least(X: Tensor, Y: Tensor | float, out: Tensor | None = None) -> Tensor:
    """Compute X >= Y, bool, in `out` or a new tensor."""
    if X.device.type != "cpu":
        return torch.ge(X, Y, out=out)
    other = Y.numpy() if isinstance(Y, Tensor) else Y
    return torch.from_numpy(np.greater_equal(X.numpy(), other, out=None if out is None else out.numpy()))


def choose(kept: Tensor, X: Tensor, Y: Tensor, out: Tensor | None = None) -> Tensor:
    """Take X where `kept` is True, else Y, in `out` or a new tensor. X and Y have one dtype, which `out` has, too."""
    if kept.device.type != "cpu":
        return torch.where(kept, X, Y, out=out)
    x, y = (Z.view(BITS[Z.dtype.itemsize]) for Z in (X, Y))
    bits = kept.view(torch.int8).neg().to(x.dtype).bitwise_and_(x ^ y)
    return torch.bitwise_xor(bits, y, out=bits if out is None else out.view(x.dtype)).view(X.dtype)
