"""Stores for the activations between two blocks (GPU, pinned memory, mapped files), and sizes of micro-batches."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefw.errors import naming

# Places where activations can be stored, the fastest first.
PLACES = ("gpu", "host", "file")


# Tokens in one micro-batch. On a GPU the work on this number takes longer than the launch, and the activations take
# little memory compared with a block's weights. On a CPU fewer tokens suffice. The survey of a block runs one more
# micro-batch, so with small micro-batches it is a smaller share of the work.
BATCH_TOKENS = {"gpu": 16384, "cpu": 2048}

# The least number of steps in a reconstruction's pass over the calibration windows, if there are enough windows. Many
# steps with few windows lower the loss more than few steps with many windows.
LEAST_STEPS = 256

# One micro-batch in HELD_OUT is held out: nothing is fitted to it.
HELD_OUT = 16

# The most bytes for the state of a solve. More bytes would not make a solve faster.
SOLVER = 4 << 30


class Store:
    """A store of tensors.

    Copies to the GPU and copies from the GPU have a CUDA stream each, besides the stream of the work. So the next
    tensor is copied in while the last one is copied out and the GPU works.

    Args:
        device: device of the work.
        place: one of PLACES. "gpu" means the device of the work, so without a GPU it is the same as "host".
        folder: folder of the files if the place is "file"; None: the system's folder for temporary files.
    """

    def __init__(self, device: torch.device, place: str = "gpu", folder: Path | None = None) -> None:
        self.device, self.place, self.folder = torch.device(device), place, folder
        self.pins = place == "host" and self.device.type == "cuda"
        self.inward, self.outward = (torch.cuda.Stream(self.device) if self.pins else None for _ in range(2))

    def put(self, x: Tensor) -> "Stored":
        """Store a tensor with its strides."""
        if x.untyped_storage().nbytes() != x.nbytes or 0 in x.stride():
            # A slice would keep its whole base tensor in memory. An expanded tensor cannot be written to.
            x = x.clone()
        if self.place == "file" and x.numel():
            return Stored(self, _mapped(x, self.folder).copy_(x))
        if not self.outward:
            return Stored(self, x)
        host = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True)
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.outward)
        return Stored(self, host, self.outward.record_event())


@dataclass(eq=False)
class Stored:
    """A tensor in a store. Its memory is freed when the last reference to this object is gone.

    Attributes:
        store: the store.
        kept: the tensor in the memory of the store.
        left: the event at the end of the tensor's copy to pinned memory; None if nothing was copied.
    """

    store: Store
    kept: Tensor
    left: torch.cuda.Event | None = None
    _arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        """Begin to copy the tensor from pinned memory to the device."""
        inward = self.store.inward
        if inward and self._arriving is None:
            if self.left:
                inward.wait_event(self.left)
            with torch.cuda.stream(inward):
                self._arriving = self.kept.to(self.store.device, non_blocking=True), inward.record_event()

    def drop(self) -> None:
        """Drop a copy on the device that `fetch` has begun and nothing has read."""
        self._arriving = None

    def read(self) -> Tensor:
        """Return the tensor on the device."""
        self.fetch()
        if self._arriving is None:
            return self.kept.to(self.store.device)
        (x, arrived), self._arriving = self._arriving, None
        work = torch.cuda.current_stream(self.store.device)
        work.wait_event(arrived)
        # The memory belongs to the stream of the copies. That stream must not reuse it before the work is done.
        x.record_stream(work)
        return x


class Activations:
    """One tensor of every micro-batch. While the device works on one tensor, the next one is copied to the device.

    The host launches work ahead of the GPU, and each launched micro-batch takes GPU memory. So a read waits until the
    GPU has finished all earlier micro-batches but the last one, unless the tensors are stored on the GPU anyway. A new
    tensor takes GPU memory until it is copied out. So at most two copies to the host are under way.

    Args:
        store: the store of the tensors.
        stored: tensors that are in it already.
    """

    def __init__(self, store: Store, stored: Iterable[Stored] = ()) -> None:
        self.store = store
        self._stored = [*stored]
        # The event at the end of all work that was launched before the last read.
        self._launched: torch.cuda.Event | None = None
        # Number of the micro-batch that is copied to the device ahead of use.
        self._prefetched: int | None = None
        # The event at the end of the last copy to the host.
        self._left: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._stored)

    def append(self, x: Tensor) -> None:
        """Add a micro-batch."""
        self._stored.append(self._put(x))

    def __setitem__(self, j: int, x: Tensor) -> None:
        # The old tensor is dropped first, so that memory never holds both.
        del self._stored[j]
        self._stored.insert(j, self._put(x))

    def _put(self, x: Tensor) -> Stored:
        stored, before = self.store.put(x), self._left
        self._left = stored.left
        if before:
            before.synchronize()
        return stored

    def __getitem__(self, j: int) -> Tensor:
        """The tensor of micro-batch j, on the device."""
        if self.store.place != "gpu" and self.store.device.type == "cuda":
            if self._launched:
                self._launched.synchronize()
            self._launched = torch.cuda.current_stream(self.store.device).record_event()
        if self._prefetched not in (None, j):
            # The prefetched micro-batch was skipped (it may be held out). Its copy must not stay on the device.
            self._stored[self._prefetched].drop()
        x = self._stored[j].read()
        self._prefetched = j + 1 if j + 1 < len(self) else None
        if self._prefetched:
            self._stored[self._prefetched].fetch()
        return x

    def stored(self, j: int) -> Stored:
        """What stores the tensor of micro-batch j."""
        return self._stored[j]

    def fork(self) -> "Activations":
        """Return a list of the same tensors that changes independently."""
        return self.some(range(len(self)))

    def some(self, numbers: Sequence[int], size: int = 0) -> "Activations":
        """Take some of the tensors. With `size`, cut them into views of at most `size` windows (the first axis)."""
        chosen = [self._stored[j] for j in numbers]
        if size:
            chosen = [Stored(self.store, x, whole.left) for whole in chosen for x in whole.kept.split(size)]
        return Activations(self.store, chosen)

    def clear(self) -> None:
        """Drop the tensors."""
        self._stored, self._prefetched = [], None


def _mapped(like: Tensor, folder: Path | None) -> Tensor:
    """An uninitialized tensor in a file that is already deleted, so that no file remains when the process ends."""
    place = folder or Path(tempfile.gettempdir())
    with naming(place), tempfile.NamedTemporaryFile(dir=place) as file:
        # Raises an error if the disk is full. If the disk is found full only in a write to the mapped file, the process
        # is killed.
        os.posix_fallocate(file.fileno(), 0, like.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
        return mapped.as_strided(like.shape, like.stride())


@dataclass(frozen=True)
class Placement:
    """The sizes of a run's working sets, and the place of its activations.

    Attributes:
        batch: number of windows in one micro-batch.
        place: place of the activations, one of PLACES.
        folder: folder of the activations' files, if the place is "file".
        ahead: whether the next block is read and the last one written in the background.
        solver: the most bytes for the state of a solve. Rows are solved in chunks of this size.
        kept_width: the inputs of a layer are kept if they have at most this width, so that the next run of the windows
            begins at the layer; 0: no inputs are kept.
        step: number of windows in a step of a reconstruction; 0: a step takes a whole micro-batch.
    """

    batch: int
    place: str = "gpu"
    folder: Path | None = None
    ahead: bool = True
    solver: int = SOLVER
    kept_width: int = 0
    step: int = 0

    def store(self, device: torch.device) -> Store:
        """Make a store for activations at `place`, for work on `device`."""
        return Store(device, self.place, self.folder)


def held_out_batches(count: int) -> range:
    """Numbers of the micro-batches that are held out: the last of every sixteen.

    If there are two to fifteen micro-batches, the last one is held out. A single one is not held out.
    """
    return range(HELD_OUT - 1, count, HELD_OUT) or range(count)[1:][-1:]


def split_batches(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the micro-batches to learn from, and numbers of the held-out ones."""
    # A range: it finds a number in constant time.
    held_out = held_out_batches(count)
    return [j for j in range(count) if j not in held_out], list(held_out)
