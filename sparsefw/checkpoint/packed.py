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
from sparsefw.kernels import packed_cpu

# The end of a mask's name, behind the name of its matrix.
MASK = "_mask"

# Entries that are looked at together.
CHUNK = 1 << 24

# Read as integers, -0.0 is not 0: unpacked matrices have the same bits.
BITS = {2: torch.int16, 4: torch.int32}


def starts_of(mask: Tensor) -> Tensor:
    """The beginnings of the rows of a packed matrix in its values, and the end of the last one, (rows + 1,) int64."""
    counts = torch.from_numpy(np.bitwise_count(mask.cpu().numpy())).sum(-1, dtype=torch.int64)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(mask.device)


def check(name: str, values: Tensor, mask: Tensor) -> None:
    """Refuse a mask that keeps other numbers of weights than there are values: others would be read behind the values.

    Raises:
        InputError: it does; `name` is the matrix's.
    """
    starts = starts_of(mask.reshape(-1, mask.shape[-1]))
    rows = torch.arange(len(starts), device=starts.device) * values.shape[-1]
    if not (torch.equal(starts, rows) if values.dim() == mask.dim() else int(starts[-1]) == len(values)):
        raise InputError(
            f"{name}{MASK}: keeps other numbers of weights than there are values; pack or download it again"
        )


def pack(name: str, W: Tensor, kept: int, whole: bool) -> tuple[Tensor, Tensor]:
    """The values and the mask of a matrix.

    Args:
        name: the matrix's name, for messages.
        W: (..., rows, cols), where 8 divides cols. Leading axes are matrices of their own.
        kept: weights kept in a row, or in the whole of a matrix (rows, cols). Where fewer are not zero, the first zeros
            are kept with them, so that the shapes depend on nothing else.
        whole: whether `kept` is that of the matrix.

    Raises:
        InputError: more weights than `kept` are not zero.
    """
    cols = W.shape[-1]
    flat = W.reshape(-1, cols)
    values, masks, spare = [], [], kept
    for part in flat.split(max(1, CHUNK // cols)):
        bits = part.view(BITS[part.element_size()]) != 0
        counts = bits.sum(-1)
        if whole:
            # Zeros are kept from the last row on only, where it is known how many.
            spare -= int(counts.sum())
        elif int(counts.max()) > kept:
            raise InputError(f"{name}: a row has {int(counts.max())} weights that are not zero, and may keep {kept}")
        else:
            _fill(bits, kept - counts)
        values.append(part[bits])
        masks.append(bits)
    mask = torch.cat(masks)
    if whole:
        if spare < 0:
            raise InputError(f"{name}: {kept - spare} weights are not zero, and {kept} may be")
        zeros = (~mask).sum(-1)
        before = zeros.cumsum(0) - zeros
        _fill(mask, (spare - before).clamp(min=0).minimum(zeros))
        values = [flat[mask]]
    packed = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    shape = (kept,) if whole else (*W.shape[:-1], kept)
    return torch.cat(values).reshape(shape), torch.from_numpy(packed).reshape(*W.shape[:-1], cols // 8)


def _fill(bits: Tensor, missing: Tensor) -> None:
    """Set the first `missing` (rows,) bits that are not set in each row."""
    for row in missing.nonzero().flatten().tolist():
        bits[row, (~bits[row]).nonzero().flatten()[: int(missing[row])]] = True


@cache
def _triton() -> ModuleType:
    """The kernels for a GPU, or what torch's operations do there, which one warning says."""
    try:
        return import_module("sparsefw.kernels.packed")
    except ImportError as error:
        warnings.warn(f"packed matrices are unpacked by torch's slower operations: {error}", stacklevel=2)
        return packed_cpu


def kernels_for(*tensors: Tensor) -> ModuleType:
    """The module whose `unpack` and `packed_product` suit the tensors. Only for those on a GPU Triton is imported."""
    suits = all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors)
    return _triton() if suits else packed_cpu


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """A packed matrix with its zeros, (..., rows, cols), on the device of its values."""
    cols, kernels = 8 * mask.shape[-1], kernels_for(values)
    flat = mask.reshape(-1, mask.shape[-1])
    if values.dim() == mask.dim():
        out = kernels.unpack(values.reshape(len(flat), -1), flat, cols=cols)
    else:
        out = kernels.unpack(values, flat, starts_of(flat), cols=cols)
    return out.reshape(*mask.shape[:-1], cols)
