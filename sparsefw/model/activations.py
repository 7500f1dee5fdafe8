"""Stores of activations between two blocks (the device, pinned memory, mapped files), and how much is held at once."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefw.errors import naming

# Places for activations, the place nearest to the work first.
PLACES = ("gpu", "host", "file")


# Tokens in one micro-batch. A GPU works on them for longer than the host takes to launch the work, and they take little
# memory compared with a block's weights. A CPU is busy with fewer, and the micro-batch that shows the stages of a block
# is then a smaller share of all.
BATCH_TOKENS = {"gpu": 16384, "cpu": 2048}

# Steps of a pass over the calibration windows in a block's reconstruction, at least, where there are windows for them:
# many steps on few windows do more than few on many.
LEAST_STEPS = 256

# One in this number of micro-batches is held out of all that is fitted.
HELD_OUT = 16

# Most bytes for the state of a solve: more make nothing faster.
SOLVER = 4 << 30


class Store:
    """A store of tensors.

    Pinned memory is copied to the GPU on one CUDA stream and from it on another, while the GPU works: the next tensor
    need not wait until the last one has left.

    Args:
        device: device that the work is done on.
        place: one of PLACES. "gpu" is where the work is, so that it is the same as "host" without a GPU.
        folder: folder of the files, for "file" only; None is the system's folder for temporary files.
    """

    def __init__(self, device: torch.device, place: str = "gpu", folder: Path | None = None) -> None:
        self.device, self.place, self.folder = torch.device(device), place, folder
        self.pins = place == "host" and self.device.type == "cuda"
        self.inward, self.outward = (torch.cuda.Stream(self.device) if self.pins else None for _ in range(2))

    def put(self, x: Tensor) -> "Stored":
        """Store a tensor, with its dimensions in the order in which they lie in memory."""
        if x.untyped_storage().nbytes() != x.nbytes or 0 in x.stride():
            # A slice would hold all of the tensor that it is cut from, and nothing can be copied to repeated entries.
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
    """A tensor in a store. Its memory is free when nothing holds it any more.

    Attributes:
        store: the store.
        kept: the tensor there.
        left: the end of its copy to pinned memory.
    """

    store: Store
    kept: Tensor
    left: torch.cuda.Event | None = None
    _arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        """Begin to copy it from pinned memory to the device."""
        inward = self.store.inward
        if inward and self._arriving is None:
            if self.left:
                inward.wait_event(self.left)
            with torch.cuda.stream(inward):
                self._arriving = self.kept.to(self.store.device, non_blocking=True), inward.record_event()

    def drop(self) -> None:
        """Drop the copy on the device, which was not read."""
        self._arriving = None

    def read(self) -> Tensor:
        """The tensor, on the device."""
        self.fetch()
        if self._arriving is None:
            return self.kept.to(self.store.device)
        (x, arrived), self._arriving = self._arriving, None
        work = torch.cuda.current_stream(self.store.device)
        work.wait_event(arrived)
        # The memory belongs to the stream of the copies, which must not use it again before the work is done.
        x.record_stream(work)
        return x


class Activations:
    """One tensor of every micro-batch. While one is worked on, the next one is copied to the device.

    The host launches work before the GPU gets to it, and every micro-batch at work takes memory. So a read waits until
    the GPU has finished all micro-batches but the last one, unless the tensors are on the GPU anyway. A tensor that is
    put takes memory until it is copied out, so at most two copies are under way.

    Args:
        store: the store of the tensors.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._stored: list[Stored] = []
        # The end of the work that had been launched when a micro-batch was read last.
        self._launched: torch.cuda.Event | None = None
        # Number of the micro-batch that is copied to the device ahead of use.
        self._prefetched: int | None = None
        # The end of the last copy out.
        self._left: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._stored)

    def append(self, x: Tensor) -> None:
        """Add a micro-batch."""
        self._stored.append(self._put(x))

    def __setitem__(self, j: int, x: Tensor) -> None:
        # The old one goes first, so that memory does not have both.
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
            # It was skipped, because it is held out, say. It would stay on the device until it is read.
            self._stored[self._prefetched].drop()
        x = self._stored[j].read()
        self._prefetched = j + 1 if j + 1 < len(self) else None
        if self._prefetched:
            self._stored[self._prefetched].fetch()
        return x

    def fork(self) -> "Activations":
        """A copy that changes independently."""
        copy = Activations(self.store)
        copy._stored = list(self._stored)
        return copy

    def some(self, numbers: Sequence[int], size: int = 0) -> "Activations":
        """Take some of the tensors; with a size, in pieces of this number of windows (the first axis), as views."""
        found, chosen = Activations(self.store), [self._stored[j] for j in numbers]
        found._stored = chosen
        if size:
            found._stored = [Stored(self.store, x, whole.left) for whole in chosen for x in whole.kept.split(size)]
        return found

    def clear(self) -> None:
        """Drop the tensors."""
        self._stored, self._prefetched = [], None


def _mapped(like: Tensor, folder: Path | None) -> Tensor:
    """A tensor in a file without a name, so that nothing is left of it however the run ends."""
    place = folder or Path(tempfile.gettempdir())
    with naming(place), tempfile.NamedTemporaryFile(dir=place) as file:
        # A full disk shows here: a mapped file would end the process when it is written to.
        os.posix_fallocate(file.fileno(), 0, like.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
        return mapped.as_strided(like.shape, like.stride())


@dataclass(frozen=True)
class Placement:
    """How much a run holds at once, and in which memory.

    Attributes:
        batch: windows in one micro-batch.
        place: where activations are held, one of PLACES.
        folder: folder of the file of activations, for "file" only.
        ahead: whether the next block is read, and the last one written, while one is worked on.
        solver: bytes that the state of a solve may take; its rows are solved in chunks.
        kept_width: inputs of layers with at most this number of entries a token are kept where the activations are, and
            the next run of the windows begins there; 0: no input is kept.
        step: windows in a step of a reconstruction, if a micro-batch has several steps; 0: a step is a micro-batch.
    """

    batch: int
    place: str = "gpu"
    folder: Path | None = None
    ahead: bool = True
    solver: int = SOLVER
    kept_width: int = 0
    step: int = 0

    def store(self, device: torch.device) -> Store:
        """A store for activations at this place, for work on `device`."""
        return Store(device, self.place, self.folder)


def held_out_batches(count: int) -> range:
    """Numbers of the micro-batches that are held out: the last of every sixteen.

    Of fewer than sixteen, and at least two, the last one is held out.
    """
    return range(HELD_OUT - 1, count, HELD_OUT) or range(count)[1:][-1:]


def split_batches(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the micro-batches to learn from, and of those that are held out."""
    # A range, in which a number is found at once.
    held_out = held_out_batches(count)
    return [j for j in range(count) if j not in held_out], list(held_out)
