"""Read tensors of a checkpoint.

Tensors are copied into memory that torch allocates. To map the files would be simpler, but pages of a mapped file stay
resident while any of its tensors is in use, and products may round differently where memory is aligned differently.

A quantized tensor is several tensors in the files (see `quantization`), and one tensor to the rest of the package. It
keeps its stored form until a model is loaded with it.
"""

import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsefw.arithmetic import check_finite
from sparsefw.checkpoint import packed
from sparsefw.checkpoint.packed import MASK
from sparsefw.errors import InputError

# An exponent without sign and mantissa (E8M0): a power of two.
EXPONENT = torch.float8_e8m0fnu


def stamp_of(stat: os.stat_result) -> tuple[int, int]:
    """Return the size of a file and the time of its last change, which tell it from a file with other content."""
    return stat.st_size, stat.st_mtime_ns


# Computes a tensor in a dtype of its values and its scales (or mask).
Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class TensorInfo:
    """Place and form of a tensor in the files.

    Attributes:
        file: path of the file, that of the values if the tensor is quantized.
        dtype: torch dtype of the tensor in a model.
        shape: shape of the tensor in a model.
        offset: first byte of the tensor in the file.
        stamp: `stamp_of` the file.
        dequantize: computes a quantized tensor of its values, its scales and a dtype; None: it is not quantized.
        parts: values and scales (or mask) of a quantized tensor in the files, in this order, by name.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    stamp: tuple[int, int] = (0, 0)
    dequantize: Dequantize | None = None
    parts: dict[str, "TensorInfo"] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a model."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the tensor in the files."""
        return sum(part.nbytes for part in self.parts.values()) or self.nbytes


# Tensors by name: their places and forms, or the tensors themselves.
Infos = dict[str, TensorInfo]
Tensors = dict[str, Tensor]


def in_files(tensors: Infos) -> Infos:
    """Return the tensors in the files that make up tensors of a model, by name."""
    return {part: x for name, info in tensors.items() for part, x in (info.parts or {name: info}).items()}


# transformers loads in several threads, and a plan counts the memory of one that dequantizes.
DEQUANTIZING = threading.Lock()


class QuantizedTensor:
    """Quantized tensor in its stored form.

    transformers loads a tensor of a file by `tensor[...]` and `.to(device, dtype)`. Here `to` also dequantizes it, on
    the device.

    Args:
        info: place and form of the tensor.
        dequantize: that of its format.
        values, scales: its tensors in the files.
    """

    def __init__(self, info: TensorInfo, dequantize: Dequantize, values: Tensor, scales: Tensor) -> None:
        self._values, self._scales, self._dequantize = values, scales, dequantize
        self.shape, self.dtype, self.device = torch.Size(info.shape), info.dtype, values.device

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Move the tensor to a device, and dequantize it there."""
        values, scales = self._values.to(device), self._scales.to(device)
        with DEQUANTIZING:
            return self._dequantize(values, scales, dtype or self.dtype)


# A tensor that a model can be loaded with.
Loadable = Tensor | QuantizedTensor

# Such tensors, by name.
Loadables = Mapping[str, Loadable]


def read_tensors(tensors: Infos, pin: bool = False) -> dict[str, Loadable]:
    """Read tensors of a checkpoint that `source.inspect` has checked.

    Args:
        tensors: the tensors to read, by name.
        pin: whether to read into pinned memory, from which a GPU copies while the host goes on.

    Returns:
        The tensors by name, on the host, in the dtype of the file. Quantized ones keep their stored form.

    Raises:
        InputError: a file has changed since the check, a scale is NaN or Inf, or a mask does not fit its values.
        OSError: a file is gone, or cannot be read.
    """
    stored = in_files(tensors)
    in_order = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
    read: Tensors = {}
    for path, of_file in itertools.groupby(in_order, lambda item: item[1].file):
        with path.open("rb") as file:
            for name, info in of_file:
                read[name] = torch.empty(info.shape, dtype=info.dtype, pin_memory=pin)
                file.seek(info.offset)
                count = file.readinto(read[name].reshape(-1).view(torch.uint8).numpy().data)
                if stamp_of(os.fstat(file.fileno())) != info.stamp or count != read[name].nbytes:
                    raise InputError(f"{path}: changed since the run began; do not change the model during a run")
    loadable: dict[str, Loadable] = {}
    for name, info in tensors.items():
        if info.dequantize:
            (part, values), (scale, scales) = ((part, read[part]) for part in info.parts)
            if scale == part + MASK:
                packed.check(part, values, scales)
            else:
                check_finite(scale, (scales.view(EXPONENT) if scales.dtype == torch.uint8 else scales).float())
            loadable[name] = QuantizedTensor(info, info.dequantize, values, scales)
        else:
            loadable[name] = read[name]
    return loadable


def read_shard(path: Path) -> Tensors:
    """Read all tensors of a safetensors file that a run has written, as copies that do not map the file."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def dequantized(tensor: Loadable) -> Tensor:
    """Return the tensor of the model, on the host."""
    return tensor.to("cpu") if isinstance(tensor, QuantizedTensor) else tensor
