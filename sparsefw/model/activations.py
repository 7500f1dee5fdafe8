"""Storage of hidden states between two blocks: on the GPU, in host memory, or in a file.

All three are used like a list of micro-batches. A micro-batch that is read is on the device. The next one is copied
there meanwhile. A micro-batch that is replaced is written in the background.
"""

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from sparsefw.errors import InputError, naming

# Places for activations, the nearest to the work first.
PLACES = ("gpu", "host", "file")


class Activations(Protocol):
    """Micro-batches of hidden states, each (batch, seqlen, d)."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch."""

    def __getitem__(self, j: int) -> Tensor:
        """Micro-batch j, on the device."""

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        """Replace micro-batch j by one of the same shape and dtype."""

    def fork(self) -> "Activations":
        """A copy that changes independently."""

    def close(self) -> None:
        """Release threads and files; the micro-batches are gone."""


class DeviceActivations:
    """Micro-batches that stay where the work is: on the GPU, or on a machine without one in host memory.

    Args:
        together: number of micro-batches that share one piece of host memory, which goes back to the system as a whole.
            Pieces of their own would leave holes in the heap. One that has another form than the first, other than
            fewer windows, has its own. 0: each has.
    """

    def __init__(self, together: int = 0) -> None:
        self._kept: list[Tensor] = []
        self._together = together
        self._memory: Tensor | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch, (batch, seqlen, d)."""
        if self._together and hidden.device.type == "cpu":
            if self._memory is None:
                self._memory = hidden.new_empty((self._together, *hidden.shape))
            if hidden.shape[1:] == self._memory.shape[2:] and len(hidden) <= self._memory.shape[1]:
                hidden = self._memory[len(self), : len(hidden)].copy_(hidden)
        self._kept.append(hidden)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept)

    def __getitem__(self, j: int) -> Tensor:
        return self._kept[j]

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        self._kept[j] = hidden

    def fork(self) -> "DeviceActivations":
        """A copy that changes independently."""
        copy = DeviceActivations()
        copy._kept = list(self._kept)
        return copy

    def close(self) -> None:
        """Let the micro-batches go."""
        self._kept, self._memory = [], None


class Pace:
    """Makes the host wait until the GPU has finished all micro-batches but the last one.

    The host launches work before the GPU gets to it, and every micro-batch at work takes memory there, or page-locked
    memory of the host.

    Args:
        device: the device; on a CPU nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The end of the work that had been launched when a micro-batch was read last.
        self._launched: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Call it when a micro-batch is read."""
        if self._device.type == "cuda":
            if self._launched:
                self._launched.synchronize()
            self._launched = torch.cuda.current_stream(self._device).record_event()


class PinnedActivations:
    """Micro-batches in page-locked host memory, copied to and from the GPU on a CUDA stream of their own; see `Pace`.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)
        self._host: list[Tensor] = []
        # The micro-batch that is being copied to the GPU before it is asked for: number, tensor, end of the copy.
        self._next: tuple[int, Tensor, torch.cuda.Event] | None = None
        self._pace = Pace(device)

    def __len__(self) -> int:
        return len(self._host)

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch, (batch, seqlen, d)."""
        self._host.append(torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True))
        self[len(self) - 1] = hidden

    def __iter__(self) -> Iterator[Tensor]:
        return (self[j] for j in range(len(self)))

    def __getitem__(self, j: int) -> Tensor:
        work = torch.cuda.current_stream(self._device)
        self._pace.wait()
        _, hidden, arrived = self._next if self._next and self._next[0] == j else self._fetch(j)
        self._next = self._fetch(j + 1) if j + 1 < len(self) else None
        work.wait_event(arrived)
        # The memory belongs to the stream of the copies, which must not use it again before the work is done.
        hidden.record_stream(work)
        return hidden

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        _check_form(hidden, self._host[j].shape, self._host[j].dtype)
        if self._next and self._next[0] == j:
            self._next = None
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._host[j].copy_(hidden, non_blocking=True)
        hidden.record_stream(self._copies)

    def _fetch(self, j: int) -> tuple[int, Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._copies):
            hidden = self._host[j].to(self._device, non_blocking=True)
        return j, hidden, self._copies.record_event()

    def fork(self) -> "PinnedActivations":
        """A copy that changes independently."""
        copy = PinnedActivations(self._device)
        for j in range(len(self)):
            copy.append(self[j])
        return copy

    def close(self) -> None:
        """Finish the copies under way, and let the micro-batches go."""
        self._copies.synchronize()
        self._host, self._next = [], None


class FiledActivations:
    """Micro-batches in a file that has no name, so that nothing is left of it however the run ends; see `Pace`.

    Args:
        device: device that the model runs on.
        folder: folder on a disk with enough free space; None is the system's folder for temporary files.
    """

    def __init__(self, device: torch.device, folder: Path | None) -> None:
        self._device, self._folder = device, folder or Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this object)
        # A single thread reads a micro-batch only after it has been written.
        self._worker = ThreadPoolExecutor(1)
        # Offset in the file, shape and dtype of each micro-batch.
        self._forms: list[tuple[int, torch.Size, torch.dtype]] = []
        # The micro-batch that is being read before it is asked for.
        self._next: tuple[int, Future[Tensor]] | None = None
        self._written: Future[None] | None = None
        self._pace = Pace(device)
        # For an object that nobody closes. Pending reads and writes hold a reference to it, so none is left by then.
        self._release = weakref.finalize(self, _release, self._worker, self._file)

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

    def __iter__(self) -> Iterator[Tensor]:
        return (self[j] for j in range(len(self)))

    def __getitem__(self, j: int) -> Tensor:
        if j >= len(self):
            raise IndexError(j)
        self._pace.wait()
        read = self._next[1] if self._next and self._next[0] == j else self._worker.submit(self._read, j)
        self._next = (j + 1, self._worker.submit(self._read, j + 1)) if j + 1 < len(self) else None
        try:
            return read.result().to(self._device, non_blocking=True)
        except OSError:
            if self._written:
                # What is missing could not be written, and why.
                self._written.result()
            raise

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        _check_form(hidden, *self._forms[j][1:])
        if self._next and self._next[0] == j:
            self._next = None
        if self._written:
            # No more than one write waits for the disk. An error of the last one shows here.
            self._written.result()
        self._written = self._worker.submit(self._write, j, hidden.cpu().contiguous())

    def _read(self, j: int) -> Tensor:
        offset, shape, dtype = self._forms[j]
        hidden = torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")
        left = _bytes(hidden)
        with naming(self._folder):
            while left:
                count = os.preadv(self._file.fileno(), [left], offset)
                if not count:
                    raise OSError(errno.EIO, "the file of activations ends early")
                left, offset = left[count:], offset + count
        return hidden

    def _write(self, j: int, hidden: Tensor) -> None:
        left, offset = _bytes(hidden), self._forms[j][0]
        with naming(self._folder):
            while left:
                count = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[count:], offset + count

    def fork(self) -> "FiledActivations":
        """A copy that changes independently."""
        copy = FiledActivations(self._device, self._folder)
        for j in range(len(self)):
            copy.append(self[j])
        return copy

    def close(self) -> None:
        """Wait for pending reads and writes; then end the thread and close the file, which deletes it."""
        self._worker.shutdown()
        self._next = None
        self._release()


def _check_form(hidden: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Refuse a micro-batch that has no place: some blocks return another dtype than they are given."""
    if (hidden.shape, hidden.dtype) != (shape, dtype):
        raise InputError(
            f"unsupported model: hidden states of {dtype} come out of a block as {hidden.dtype}; give more memory, so "
            "that they can stay where the work is"
        )


def _release(worker: ThreadPoolExecutor, file: IO[bytes]) -> None:
    # Not waited for: the last reference may be dropped on the worker's own thread.
    worker.shutdown(wait=False)
    file.close()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def make_activations(place: str, device: torch.device, folder: Path | None = None, *, together: int = 0) -> Activations:
    """An empty list of micro-batches.

    Args:
        place: one of PLACES; "gpu" and "host" are the same without a GPU.
        device: device that the model runs on.
        folder: folder of the file, for "file" only.
        together: as in `DeviceActivations`.
    """
    if place == "file":
        return FiledActivations(device, folder)
    return PinnedActivations(device) if place == "host" and device.type == "cuda" else DeviceActivations(together)
