"""Read tensors of a checkpoint into memory of our own.

Mapping the files would be simpler. But pages of a mapped file stay resident as long as any of its tensors is in use,
and products may round differently where memory is aligned differently. Here torch aligns every tensor.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    read = {}
    for names in by_file.values():
        with opened(stored[names[0]]) as file:
            for name in names:
                tensor = torch.empty(stored[name].shape, dtype=stored[name].dtype, pin_memory=pin)
                file.seek(stored[name].offset)
                read_into(
                    file, tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
                )
                read[name] = tensor
    loadable: dict[str, Loadable] = {}
    for name, info in tensors.items():
        if isinstance(info, QuantizedInfo):
            scales = read[info.scales]
            check_finite(info.scales, (scales.view(EXPONENT) if scales.dtype == torch.uint8 else scales).float())
        loadable[name] = QuantizedTensor(info, read) if isinstance(info, QuantizedInfo) else read[name]
    return loadable


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that a run has written, in memory of our own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def read_rows(name: str, info: TensorInfo, ranges: Iterable[range]) -> Iterator[Tensor]:
    """Read rows of a tensor: for each range of their numbers those rows, on the host, in the dtype of the file."""
    row = info.nbytes // max(1, info.shape[0])
    with opened(info) as file:
        for rows in ranges:
            tensor = torch.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
            file.seek(info.offset + row * rows.start)
            read_into(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield tensor


@contextmanager
def opened(info: TensorInfo) -> Iterator[FileIO]:
    """A tensor's file, which is the one that was inspected.

    Raises:
        InputError: it was changed since then, or cannot be read.
    """
    try:
        with info.file.open("rb", buffering=0) as file:
            if stamp_of(os.fstat(file.fileno())) != info.stamp:
                raise InputError(f"{info.file}: was changed since the run began; leave the model as it is meanwhile")
            yield file
    except OSError as error:
        raise InputError(f"{info.file}: cannot be read any more: {first_line(error)}") from error


def read_into(file: FileIO, left: memoryview) -> None:
    """Fill memory with the next bytes of a file."""
    while left:
        # Linux reads 2 GiB at most at a time.
        count = file.readinto(left)
        if not count:
            raise InputError(f"{file.name}: ends before its tensors do; it was changed since the run began")
        left = left[count:]
