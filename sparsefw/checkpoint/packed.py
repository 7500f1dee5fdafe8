"""Packed matrices: the kept weights, and a bit for each weight that says which are kept.

NAME        (..., rows, k), the kept weights of each row, or (n,) where rows keep different numbers, row after row
NAME_mask   (..., rows, cols / 8) uint8, bit c % 8 of byte c / 8 is set where column c is kept

The values have the name that the matrix has in other checkpoints. A library that does not know the format meets another
shape there and refuses it, while it would make up a matrix that it does not find.
"""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.kernels.cpu import packed as packed_cpu

# Version of this layout.
FORMAT = 1

# The end of a mask's name, after the name of its matrix.
MASK = "_mask"

# Integer types by the bytes of a value. Compared as integers, -0.0 is not 0, and a NaN equals itself.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def starts_of(mask: Tensor) -> Tensor:
    """Count where each row of a packed matrix begins in its values, and where the last one ends: (rows + 1,) int64."""
    counts = torch.from_numpy(np.bitwise_count(mask.cpu().numpy())).sum(-1, dtype=torch.int64)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(mask.device)


def check(name: str, values: Tensor, mask: Tensor) -> None:
    """Refuse a mask that keeps another number of weights than there are values: more would be read than the values.

    Raises:
        InputError: the numbers differ; `name` is the matrix's name.
    """
    starts = starts_of(mask.reshape(-1, mask.shape[-1]))
    rows = torch.arange(len(starts), device=starts.device) * values.shape[-1]
    if not (torch.equal(starts, rows) if values.dim() == mask.dim() else int(starts[-1]) == len(values)):
        raise InputError(f"{name}{MASK}: keeps other numbers of weights than there are; pack or download it again")


@cache
def _triton() -> ModuleType:
    """Import the kernels for a GPU, or warn once and return torch's slower operations."""
    try:
        return import_module("sparsefw.kernels.packed")
    except ImportError as error:
        warnings.warn(f"packed matrices are unpacked by torch's slower operations: {error}", stacklevel=2)
        return packed_cpu


def kernels_for(*tensors: Tensor) -> ModuleType:
    """Return the module whose `unpack` and `packed_product` suit the tensors; Triton is only imported for a GPU."""
    suits = all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors)
    return _triton() if suits else packed_cpu


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Put the zeros back into a packed matrix: (..., rows, cols), on the device of its values."""
    cols, kernels = 8 * mask.shape[-1], kernels_for(values)
    flat = mask.reshape(-1, mask.shape[-1])
    if values.dim() == mask.dim():
        out = kernels.unpack(values.reshape(len(flat), -1), flat, cols=cols)
    else:
        out = kernels.unpack(values, flat, starts_of(flat), cols=cols)
    return out.reshape(*mask.shape[:-1], cols)
