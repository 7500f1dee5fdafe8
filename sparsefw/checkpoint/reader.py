"""Read tensors of a checkpoint into memory of our own.

Mapping the files would be simpler. But pages of a mapped file stay resident as long as any of its tensors is in use,
and products may round differently where memory is aligned differently. Here torch aligns every tensor.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsefw.checkpoint.source import MAX_HEADER_BYTES
from sparsefw.checkpoint.tensors import EXPONENT, Loadable, QuantizedInfo, QuantizedTensor, TensorInfo
from sparsefw.errors import InputError, first_line
from sparsefw.finite import check_finite


def read_tensors(
    tensors: dict[str, TensorInfo],
    pin: bool = False,
    on_read: Callable[[str, FileIO, memoryview], None] = lambda name, file, data: None,
) -> dict[str, Loadable]:
    """Read tensors of a checkpoint that `checkpoint.inspect` has found sound.

    Args:
        tensors: the tensors to read, by name.
        pin: whether to read into page-locked memory, from which a GPU copies while the host goes on.
        on_read: called with the name, the open file and the bytes of every tensor in the files.

    Returns:
        The tensors by name, on the host, in the dtype of the file; quantized ones in the form that they are stored in.

    Raises:
        InputError: a file was changed or removed since then, or cannot be read, or a scale is NaN or Inf.
    """
    stored, read = stored_parts(tensors), {}
    for name, file in opened_at(stored):
        tensor = torch.empty(stored[name].shape, dtype=stored[name].dtype, pin_memory=pin)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        read_into(file, data)
        on_read(name, file, data)
        read[name] = tensor
    return {
        name: _loadable(info, read) if isinstance(info, QuantizedInfo) else read[name] for name, info in tensors.items()
    }


def read_rows(name: str, info: TensorInfo, ranges: Iterable[range]) -> Iterator[Tensor]:
    """Read rows of a tensor: for each range of their numbers those rows, on the host, in the dtype of the file.

    Args:
        name: name of the tensor, which is not quantized.
        info: the tensor.
        ranges: the numbers, in any order.

    Raises:
        InputError: as `read_tensors`.
    """
    row = info.nbytes // max(1, info.shape[0])
    for _, file in opened_at({name: info}):
        start = file.tell()
        for rows in ranges:
            tensor = torch.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
            file.seek(start + row * rows.start)
            read_into(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield tensor


def stored_parts(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors in the files that these are made of, by name."""
    return {part: info for name, tensor in tensors.items() for part, info in tensor.stored(name).items()}


def _loadable(info: QuantizedInfo, read: dict[str, Tensor]) -> QuantizedTensor:
    scales = read[info.scales]
    check_finite(info.scales, (scales.view(EXPONENT) if scales.dtype == torch.uint8 else scales).float())
    return QuantizedTensor(info, read)


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that a run has written, in memory of our own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def opened_at(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, FileIO]]:
    """The name of every tensor and its file, open at the tensor's first byte, in the order within the files."""
    names_by_file: dict[Path, list[str]] = {}
    for name, info in tensors.items():
        names_by_file.setdefault(info.file, []).append(name)
    for path, names in names_by_file.items():
        try:
            with path.open("rb", buffering=0) as file:
                length = int.from_bytes(file.read(8), "little")
                # Whatever lies there now, it is not read without a limit.
                header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
                for name in sorted(names, key=lambda name: header[name]["data_offsets"][0]):
                    start, end = header[name]["data_offsets"]
                    if end - start != tensors[name].nbytes:
                        raise InputError(f"{path}: tensor {name} is not what it was when the run began")
                    file.seek(8 + length + start)
                    yield name, file
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}: cannot be read any more: {first_line(error)}") from error


def read_into(file: FileIO, left: memoryview) -> None:
    """Fill memory with the next bytes of a file.

    Raises:
        InputError: the file ends before.
    """
    while left:
        # Linux reads 2 GiB at most at a time.
        count = file.readinto(left)
        if not count:
            raise InputError(f"{file.name}: ends before its tensors do; it was changed since the run began")
        left = left[count:]
