"""The sizes and places that fit a run into memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsefw.model.activations import Store

# Tokens in one micro-batch: enough to fill a GPU, little beside a block's weights. A CPU is busy with fewer, and the
# micro-batch that shows the stages of a block is a smaller share of all.
BATCH_TOKENS = {"gpu": 4096, "cpu": 2048}

# Micro-batches of the calibration windows, at least, where there are windows for them and each is a step of a block's
# reconstruction: many steps on few windows do more than few on many.
LEAST_BATCHES = 256

# One of so many micro-batches is held out of all that is fitted.
HELD_OUT = 16

# Most bytes for the state of a solve: more make nothing faster.
SOLVER = 4 << 30


@dataclass(frozen=True)
class Placement:
    """How much a run holds at once, and in which memory.

    Attributes:
        batch: windows in one micro-batch.
        place: where activations are held, one of `activations.PLACES`.
        folder: folder of the file of activations, for "file" only.
        ahead: whether the next block is read, and the last one written, while one is worked on.
        solver: bytes that the state of a solve may take; its rows are solved in chunks.
        kept_width: inputs of layers of at most this many entries a token are kept where the activations are, so that
            the next run of the windows begins there; 0: none.
    """

    batch: int
    place: str = "gpu"
    folder: Path | None = None
    ahead: bool = True
    solver: int = SOLVER
    kept_width: int = 0

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
