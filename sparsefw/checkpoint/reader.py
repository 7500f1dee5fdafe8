"""Read tensors of a checkpoint into memory of our own.

Mapping the files would be simpler. But pages of a mapped file stay resident as long as any of its tensors is in use,
and products may round differently where memory is aligned differently. Here torch aligns every tensor.
"""

import os
from io import FileIO
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsefw.checkpoint.tensors import EXPONENT, Loadable, QuantizedInfo, QuantizedTensor, TensorInfo, stamp_of
from sparsefw.errors import InputError, first_line
from sparsefw.finite import check_finite


def read_tensors(tensors: dict[str, TensorInfo], pin: bool = False) -> dict[str, Loadable]:
    """Read tensors of a checkpoint that `checkpoint.inspect` has found sound.

    Args:
        tensors: the tensors to read, by name.
        pin: whether to read into pinned memory, from which a GPU copies while the host goes on.

    Returns:
        The tensors by name, on the host, in the dtype of the file; quantized ones in the form that they are stored in.

    Raises:
        InputError: a file was changed or removed since then, or cannot be read, or a scale is NaN or Inf.
    """
    stored = {part: info for name, tensor in tensors.items() for part, info in tensor.stored(name).items()}
    by_file: dict[Path, list[str]] = {}
    for name in sorted(stored, key=lambda name: stored[name].offset):
        by_file.setdefault(stored[name].file, []).append(name)
    read: dict[str, Tensor] = {}
    for path, names in by_file.items():
        try:
            with path.open("rb", buffering=0) as file:
                for name in names:
                    if stamp_of(os.fstat(file.fileno())) != stored[name].stamp:
                        raise InputError(f"{path}: was changed since the run began; leave the model as it is meanwhile")
                    read[name] = torch.empty(stored[name].shape, dtype=stored[name].dtype, pin_memory=pin)
                    file.seek(stored[name].offset)
                    if read[name].numel():
                        _read_into(file, read[name].reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise InputError(f"{path}: cannot be read any more: {first_line(error)}") from error
    loadable: dict[str, Loadable] = {}
    for name, info in tensors.items():
        if isinstance(info, QuantizedInfo):
            values, scales = (read[part] for part in info.parts)
            floats = (scales.view(EXPONENT) if scales.dtype == torch.uint8 else scales).float()
            check_finite(list(info.parts)[1], floats)
            loadable[name] = QuantizedTensor(info, values, scales)
        else:
            loadable[name] = read[name]
    return loadable


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that a run has written, in memory of our own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _read_into(file: FileIO, left: memoryview) -> None:
    """Fill memory with the next bytes of a file."""
    while left:
        # Linux reads 2 GiB at most at a time.
        count = file.readinto(left)
        if not count:
            raise InputError(f"{file.name}: ends before its tensors do; it was changed since the run began")
        left = left[count:]
