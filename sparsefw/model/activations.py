"""Where hidden states lie between two blocks: on the GPU, in host memory, or in a file.

All three are used like a list of micro-batches. What is taken out is on the device; the next micro-batch is already on
its way there while this one is worked on, and what is put in is written behind the work.
"""

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

# Where activations may lie, the nearest to the work first.
PLACES = ("gpu", "host", "file")


class Activations:
    """Micro-batches that stay where the work is: on the GPU, or on a machine without one in host memory."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch, (batch, seqlen, d)."""
        self._kept.append(hidden)

    def __getitem__(self, j: int) -> Tensor:
        return self._kept[j]

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        self._kept[j] = hidden

    def fork(self) -> "Activations":
        """A copy; the two then change apart."""
        copy = Activations()
        copy._kept = list(self._kept)
        return copy


class PinnedActivations:
    """Micro-batches in page-locked host memory, copied to and from the GPU on a stream of their own.

    Of what the host launches ahead of the GPU every micro-batch takes memory there: it waits for all but the last one.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)
        self._host: list[Tensor] = []
        self._ahead: tuple[int, Tensor, torch.cuda.Event] | None = None
        # What had been launched when a micro-batch was taken out last.
        self._launched: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._host)

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch, (batch, seqlen, d)."""
        self._host.append(torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True))
        self[len(self) - 1] = hidden

    def __getitem__(self, j: int) -> Tensor:
        work = torch.cuda.current_stream(self._device)
        if self._launched:
            self._launched.synchronize()
        self._launched = work.record_event()
        _, hidden, arrived = self._ahead if self._ahead and self._ahead[0] == j else self._fetch(j)
        self._ahead = self._fetch(j + 1) if j + 1 < len(self) else None
        work.wait_event(arrived)
        # Its memory belongs to the stream of copies, which must not use it again before the work is done.
        hidden.record_stream(work)
        return hidden

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        if self._ahead and self._ahead[0] == j:
            self._ahead = None
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._host[j].copy_(hidden, non_blocking=True)
        hidden.record_stream(self._copies)

    def _fetch(self, j: int) -> tuple[int, Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._copies):
            hidden = self._host[j].to(self._device, non_blocking=True)
        return j, hidden, self._copies.record_event()

    def fork(self) -> "PinnedActivations":
        """A copy; the two then change apart."""
        copy = PinnedActivations(self._device)
        for j in range(len(self)):
            copy.append(self[j])
        return copy


class FiledActivations:
    """Micro-batches in a file that has no name, so that nothing is left of it however the run ends.

    Args:
        device: where the work is.
        folder: on a disk with room for them.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self._device, self._folder = device, folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this object)
        # One thread: what is read was written before.
        self._worker = ThreadPoolExecutor(1)
        self._forms: list[tuple[int, torch.Size, torch.dtype]] = []
        self._ahead: tuple[int, Future] | None = None
        self._written: Future | None = None

    def __len__(self) -> int:
        return len(self._forms)

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch, (batch, seqlen, d)."""
        end = 0
        if self._forms:
            offset, shape, dtype = self._forms[-1]
            end = offset + shape.numel() * dtype.itemsize
        self._forms.append((end, hidden.shape, hidden.dtype))
        self[len(self) - 1] = hidden

    def __getitem__(self, j: int) -> Tensor:
        if j >= len(self):
            raise IndexError(j)
        ahead = self._ahead[1] if self._ahead and self._ahead[0] == j else self._worker.submit(self._read, j)
        self._ahead = (j + 1, self._worker.submit(self._read, j + 1)) if j + 1 < len(self) else None
        return ahead.result().to(self._device, non_blocking=True)

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        if self._ahead and self._ahead[0] == j:
            self._ahead = None
        if self._written:
            # One write at a time waits for the disk; and an error of the last one shows here.
            self._written.result()
        self._written = self._worker.submit(self._write, j, hidden.cpu().contiguous())

    def _read(self, j: int) -> Tensor:
        offset, shape, dtype = self._forms[j]
        hidden = torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")
        left = _bytes(hidden)
        while left:
            count = os.preadv(self._file.fileno(), [left], offset)
            if not count:
                raise OSError(f"{self._folder}: the file of activations ends early")
            left, offset = left[count:], offset + count
        return hidden

    def _write(self, j: int, hidden: Tensor) -> None:
        left, offset = _bytes(hidden), self._forms[j][0]
        while left:
            count = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[count:], offset + count

    def fork(self) -> "FiledActivations":
        """A copy; the two then change apart."""
        copy = FiledActivations(self._device, self._folder)
        for j in range(len(self)):
            copy.append(self[j])
        return copy


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def activations(
    place: str, device: torch.device, folder: Path | None = None
) -> Activations | PinnedActivations | FiledActivations:
    """Room for the micro-batches of one stream.

    Args:
        place: one of PLACES; "gpu" and "host" are the same without a GPU.
        device: where the work is.
        folder: for "file".
    """
    if place == "file":
        return FiledActivations(device, folder)
    return PinnedActivations(device) if place == "host" and device.type == "cuda" else Activations()
