"""packed_product, unpack: multiply by packed matrices, and expand them, on a CPU; `../packed.py` has the formulas.

packed.cpp multiplies if it was compiled at installation, x has up to 16 rows, dtypes are fp32 or bf16, and 32 divides
cols. It uses the best instructions that the processor has, and is memory-bound. In all other cases some rows of W are
expanded at a time, and torch multiplies.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import LEVELS as LEVELS
from .library import level, library

# Highest number of rows of x that packed.cpp multiplies in one call.
MOST = 16
# Number of entries of W that are expanded at a time if x has more rows, on a CPU and on a GPU. Few entries stay in a
# CPU's caches. Many entries are expected to keep a GPU busy (not measured).
EXPANDED, EXPANDED_GPU = 1 << 22, 1 << 26

_DTYPES = (torch.float32, torch.bfloat16)


def _library_for(values: Tensor, cols: int) -> ctypes.CDLL | None:
    suits = level() is not None and values.device.type == "cpu" and values.dtype in _DTYPES and cols % 32 == 0
    return library() if suits else None


def check_packed(values: Tensor, mask: Tensor, starts: Tensor | None, cols: int) -> None:
    """Check shapes, dtypes and contiguity, since a kernel would read past the end of a wrong tensor.

    Raises:
        ValueError: the tensors do not make up a packed matrix.
    """
    rows, k = len(mask), values.shape[-1]
    expected = [
        ("mask", mask, (rows, -(-cols // 8)), torch.uint8),
        ("values", values, (rows, k) if starts is None else (k,), values.dtype),
    ]
    expected += [] if starts is None else [("starts", starts, (rows + 1,), torch.int64)]
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            got = f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise ValueError(f"{name}: expected contiguous {shape} in {dtype}, got {got}")


def last_row(mask: Tensor, first: int, last: int | None) -> int:
    """Return the row after the last one; raise ValueError unless rows from `first` to `last` are rows of the mask."""
    last = len(mask) if last is None else last
    if not 0 <= first <= last <= len(mask):
        raise ValueError(f"first, last: expected 0 <= first <= last <= {len(mask)}, got {first} and {last}")
    return last


def _matrix(values: Tensor, mask: Tensor, starts: Tensor | None, cols: int) -> list[int | None]:
    """Return the arguments that describe W to packed.cpp."""
    k = values.shape[1] if starts is None else 0
    half = int(values.dtype == torch.bfloat16)
    return [half, *(t if t is None else t.data_ptr() for t in (values, mask, starts)), len(mask), cols, k]


def expanded(values: Tensor, mask: Tensor, cols: int) -> Tensor:
    """Expand a packed matrix in torch, (rows, cols). The values follow one another, with or without `starts`."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return values.new_zeros(len(mask), cols).masked_scatter_(bits.flatten(1)[:, :cols].bool(), values)


def unpack(
    values: Tensor, mask: Tensor, starts: Tensor | None = None, *, cols: int, first: int = 0, last: int | None = None
) -> Tensor:
    """Expand rows of a packed matrix, (last - first, cols) in the dtype of the values.

    Args:
        values: (rows, k), or (n,) with `starts`. All tensors are contiguous.
        mask: (rows, ceil(cols / 8)) uint8. Bits after the last column are 0.
        starts: (rows + 1,) int64, the positions in `values` at which each row begins and the last row ends.
        cols: number of columns of the matrix.
        first, last: first row, and the row after the last row; None: all rows from `first` on.

    Raises:
        ValueError: an argument does not fit this description.
    """
    check_packed(values, mask, starts, cols)
    last = last_row(mask, first, last)
    if compiled := _library_for(values, cols):
        out = values.new_empty(last - first, cols)
        matrix = _matrix(values, mask, starts, cols)
        compiled.packed_unpack(level(), torch.get_num_threads(), *matrix, first, last, out.data_ptr())
        return out
    part = values[first:last] if starts is None else values[starts[first] : starts[last]]
    return expanded(part, mask[first:last], cols)


def packed_product(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """Compute x W^T, (batch, rows) in the dtype of x; sums are in fp32.

    Args:
        x: (batch, cols) floating.
        values, mask, starts: the packed matrix W, as for `unpack`.

    Raises:
        ValueError: an argument does not fit this description.
    """
    batch, cols = x.shape
    check_packed(values, mask, starts, cols)
    takes_x = 0 < batch <= MOST and x.dtype in _DTYPES and x.device == values.device and x.is_contiguous()
    if takes_x and (compiled := _library_for(values, cols)):
        y = x.new_empty(batch, len(mask))
        half, matrix = int(x.dtype == torch.bfloat16), _matrix(values, mask, starts, cols)
        compiled.packed_product(level(), torch.get_num_threads(), half, x.data_ptr(), batch, *matrix, y.data_ptr())
        return y
    return unpacked_product(x, values, mask, starts, unpack)


def unpacked_product(
    x: Tensor, values: Tensor, mask: Tensor, starts: Tensor | None, unpack: Callable[..., Tensor]
) -> Tensor:
    """Compute x W^T with torch; `unpack` expands some rows of W at a time. Other arguments as in `packed_product`."""
    cols, rows = x.shape[1], len(mask)
    y = x.new_empty(len(x), rows)
    size = max(1, (EXPANDED if x.device.type == "cpu" else EXPANDED_GPU) // max(1, cols))
    for first in range(0, rows, size):
        last = min(first + size, rows)
        W = unpack(values, mask, starts, cols=cols, first=first, last=last)
        y[:, first:last] = F.linear(x, W.to(x.dtype))
    return y
