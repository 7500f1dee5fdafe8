"""Tensors of a checkpoint: those that are not read yet, and quantized ones, which are read in their stored form.

Tensors are read into memory of our own. Mapping the files would be simpler. But pages of a mapped file stay resident as
long as any of its tensors is in use, and products may round differently where memory is aligned differently. Here torch
aligns every tensor.

A quantized tensor is several tensors in the files: its values, and scales that they are multiplied with. So is a packed
one: its values, and a mask. The rest of the package sees one tensor of the model's dtype. It stays in its small form
until a model is loaded with it.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsefw.arithmetic import check_finite
from sparsefw.checkpoint.packed import check, unpack
from sparsefw.errors import InputError

# Values of a 4-bit float with one mantissa bit (E2M1), by its bits.
FP4_VALUES = [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
# An exponent without sign and mantissa (E8M0): the power of two that a group of 4-bit floats is multiplied with.
EXPONENT = torch.float8_e8m0fnu

# Entries that are dequantized at once, by type of device, and the bytes that each takes meanwhile. A chunk takes some
# launches of a GPU.
CHUNK = {"cpu": 2**20, "cuda": 2**24}
BYTES_OF_CHUNK = 12


def stamp_of(stat: os.stat_result) -> tuple[int, int]:
    """Size of a file, and the time of the last change of its content."""
    return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that is not read.

    Attributes:
        file: its file.
        dtype, shape: its torch dtype and its shape.
        offset: bytes of the file before it.
        stamp: tells the file from one with another content, see `stamp_of`.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = field(default=0, kw_only=True)
    stamp: tuple[int, int] = field(default=(0, 0), kw_only=True)

    @property
    def nbytes(self) -> int:
        """Size of the data, in the memory of a model."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_nbytes(self) -> int:
        """Size of the data, as it is stored."""
        return sum(part.nbytes for part in self.stored("").values())

    def stored(self, name: str) -> dict[str, "TensorInfo"]:
        """The tensors in the files that this one is made of, by name; `name` is its own."""
        return {name: self}


@dataclass(frozen=True)
class QuantizedInfo(TensorInfo):
    """A quantized tensor that is not read. `file` is that of the values, dtype and shape are those of the result.

    Attributes:
        method: "fp8", "mxfp4", or "sparsefw": packed.
        parts: the stored values and their scales, or their mask, in this order, by name.
        block: (rows, columns) that share a scale, for values in FP8.
    """

    method: str
    parts: dict[str, TensorInfo]
    block: tuple[int, int] = (0, 0)

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """See `TensorInfo`."""
        return self.parts


class QuantizedTensor:
    """A quantized tensor in its stored form.

    transformers loads a tensor of a file by `tensor[...]` and `.to(device, dtype)`. The latter dequantizes here, on the
    device.

    Args:
        info: how it is stored.
        values, scales: the stored tensors; of a packed one the values and the mask.
    """

    def __init__(self, info: QuantizedInfo, values: Tensor, scales: Tensor) -> None:
        self._values, self._scales, self._method, self._block = values, scales, info.method, info.block
        self.shape, self.dtype, self.device = torch.Size(info.shape), info.dtype, values.device

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantized tensor."""
        values, scales = self._values.to(device), self._scales.to(device)
        if self._method == "sparsefw":
            return unpack(values, scales).to(dtype or self.dtype)
        if self._method == "mxfp4":
            return dequantize_mxfp4(values, scales, dtype or self.dtype)
        return dequantize_fp8(values, scales, self._block, dtype or self.dtype)


# A tensor that a model can be loaded with.
Loadable = Tensor | QuantizedTensor


def read_tensors(tensors: dict[str, TensorInfo], pin: bool = False) -> dict[str, Loadable]:
    """Read tensors of a checkpoint that `checkpoint.inspect` has found sound.

    Args:
        tensors: the tensors to read, by name.
        pin: whether to read into pinned memory, from which a GPU copies while the host goes on.

    Returns:
        The tensors by name, on the host, in the dtype of the file; quantized ones in the form that they are stored in.

    Raises:
        InputError: a file was changed since then, a scale is NaN or Inf, or a mask does not fit its values.
        OSError: a file was removed, or cannot be read.
    """
    stored = {part: info for name, tensor in tensors.items() for part, info in tensor.stored(name).items()}
    by_file: dict[Path, list[str]] = {}
    for name in sorted(stored, key=lambda name: stored[name].offset):
        by_file.setdefault(stored[name].file, []).append(name)
    read: dict[str, Tensor] = {}
    for path, names in by_file.items():
        with path.open("rb") as file:
            for name in names:
                read[name] = torch.empty(stored[name].shape, dtype=stored[name].dtype, pin_memory=pin)
                file.seek(stored[name].offset)
                count = file.readinto(read[name].reshape(-1).view(torch.uint8).numpy().data)
                if stamp_of(os.fstat(file.fileno())) != stored[name].stamp or count != read[name].nbytes:
                    raise InputError(f"{path}: was changed since the run began; leave the model as it is meanwhile")
    loadable: dict[str, Loadable] = {}
    for name, info in tensors.items():
        if isinstance(info, QuantizedInfo):
            values, scales = (read[part] for part in info.parts)
            if info.method == "sparsefw":
                check(name, values, scales)
            else:
                floats = (scales.view(EXPONENT) if scales.dtype == torch.uint8 else scales).float()
                check_finite(list(info.parts)[1], floats)
            loadable[name] = QuantizedTensor(info, values, scales)
        else:
            loadable[name] = read[name]
    return loadable


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that a run has written, in memory of our own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def dequantized(tensor: Loadable) -> Tensor:
    """A tensor in the model's form, on the host."""
    return tensor.to("cpu") if isinstance(tensor, QuantizedTensor) else tensor


def dequantize_fp8(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Multiply every block of values by its scale, in fp32, and round once.

    The operation of transformers does the same, but takes the size of a block to be the matrix's divided by the number
    of scales. That is wrong where the last blocks are smaller, as in DeepSeek-V3.

    Args:
        values: (..., rows, columns) in FP8.
        scales: (..., blocks of rows, blocks of columns), or one entry for each matrix; any floating dtype.
        block: rows and columns of a block.
        dtype: dtype of the result.
    """
    rows, columns = values.shape[-2:]
    height, width = block
    matrices = values.reshape(-1, rows, columns)
    grids = scales.float().reshape(len(matrices), -(-rows // height), -(-columns // width))
    out = torch.empty(matrices.shape, dtype=dtype, device=values.device)
    step = max(1, CHUNK[values.device.type] // columns)
    # The block of each row. Blocks may be far larger than the matrix.
    row_blocks, width = torch.arange(rows, device=values.device) // height, min(width, columns)
    for matrix, grid, result in zip(matrices, grids, out, strict=True):
        for first in range(0, rows, step):
            chunk = matrix[first : first + step].float()
            factors = grid[row_blocks[first : first + step]].repeat_interleave(width, 1)[:, :columns]
            result[first : first + step] = chunk.mul_(factors)
    return out.reshape(values.shape)


def dequantize_mxfp4(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply every group of 4-bit floats by its power of two. The result is transposed, as the model takes it.

    Args:
        values: (experts, rows, groups, bytes of a group), two floats a byte, the first in the lower bits.
        scales: (experts, rows, groups), exponents as bytes.
        dtype: dtype of the result.

    Returns:
        (experts, columns, rows), contiguous.
    """
    experts, rows, groups, width = values.shape
    table = torch.tensor(FP4_VALUES, device=values.device)
    out = torch.empty((experts, groups * 2 * width, rows), dtype=dtype, device=values.device)
    step = max(1, CHUNK[values.device.type] // (groups * 2 * width))
    for packed, exponents, result in zip(values, scales, out, strict=True):
        for first in range(0, rows, step):
            chunk = packed[first : first + step]
            floats = table[torch.stack([chunk & 0xF, chunk >> 4], -1).int()]
            powers = exponents[first : first + step].view(EXPONENT).float()
            floats = floats.reshape(len(chunk), groups, 2 * width) * powers.unsqueeze(-1)
            result[:, first : first + step] = floats.reshape(len(chunk), -1).T
    return out
