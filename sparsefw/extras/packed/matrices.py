"""Pack matrices in the layout of `checkpoint.packed`."""

import numpy as np
import torch
from torch import Tensor

from sparsefw.checkpoint.packed import BITS
from sparsefw.errors import InputError

# At most about this many entries are counted or gathered at a time, to limit memory.
CHUNK = 1 << 24


def pack(name: str, W: Tensor, kept: int, whole: bool) -> tuple[Tensor, Tensor]:
    """Make the kept values and the mask of a matrix.

    Args:
        name: the matrix's name, for messages.
        W: (..., rows, cols), where 8 divides cols. Each index of the leading axes is a separate matrix.
        kept: number of weights kept in a row, or in a whole matrix (rows, cols). If fewer weights are not zero, the
            first zeros are kept too, so that the shapes depend on `kept` alone.
        whole: whether `kept` counts the weights of a whole matrix.

    Raises:
        InputError: more weights than `kept` are not zero.
    """
    cols = W.shape[-1]
    flat, rows = W.reshape(-1, cols), max(1, CHUNK // cols)
    mask = flat.view(BITS[flat.itemsize]) != 0
    counts = torch.cat([bits.sum(-1) for bits in mask.split(rows)])
    most = int(counts.sum() if whole else counts.max())
    if most > kept:
        where = "matrix" if whole else "row"
        raise InputError(f"{name}: a {where} has {most} weights that are not zero, and may keep {kept}")
    missing = kept - counts
    if whole:
        zeros = cols - counts
        missing = (kept - most - (zeros.cumsum(0) - zeros)).clamp(min=0).minimum(zeros)
    for row in missing.nonzero().flatten().tolist():
        mask[row, (~mask[row]).nonzero().flatten()[: int(missing[row])]] = True
    values = torch.cat([part[bits] for part, bits in zip(flat.split(rows), mask.split(rows), strict=True)])
    packed = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    shape = (kept,) if whole else (*W.shape[:-1], kept)
    return values.reshape(shape), torch.from_numpy(packed).reshape(*W.shape[:-1], cols // 8)
