"""How much memory a pass of requests takes, and the room that fits it into the limits.

Weights are held a block at a time. Hidden states are held a micro-batch at a time where they are used, and all of them
where they are placed. On a machine without a GPU all of it is on the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from sparsefw.estimate import MemoryNeeds, first_that_fits
from sparsefw.estimate.forward_memory import (
    SLACK,
    forward_bytes,
    libraries_bytes,
    outside_page_locked,
    page_locked_of_block,
)
from sparsefw.model import ModelShape
from sparsefw.model.activations import PLACES, Store
from sparsefw.model.placement import BATCH_TOKENS
from sparsefw.process import page_locked_bytes

# Bytes of logits in fp32 that are computed at once, without and with a GPU; twice as many are made of them.
LOGITS = {False: 16 * 2**20, True: 128 * 2**20}

# Bytes of host memory for each target, and for each token that is read: numbers of positions, tokens and requests.
BYTES_PER_TARGET, BYTES_PER_TOKEN = 96, 12


@dataclass(frozen=True)
class Room:
    """How much a pass holds at once, and in which memory.

    Attributes:
        tokens: most tokens in a micro-batch, unless a single row has more.
        place: where hidden states are held, one of `activations.PLACES`.
        folder: folder of their file, for "file" only; None: that of the system for temporary files.
        ahead: whether the next block is read while one is worked on.
    """

    tokens: int = BATCH_TOKENS["cpu"]
    place: str = "host"
    folder: Path | None = None
    ahead: bool = True

    def batch(self, length: int) -> int:
        """Rows of this length in a micro-batch."""
        return max(1, self.tokens // length)

    def store(self, device: torch.device) -> Store:
        """A store for hidden states at this place, for work on `device`."""
        return Store(device, self.place, self.folder)


@dataclass(frozen=True)
class Work:
    """The sizes that the memory of a pass depends on.

    Attributes:
        shape: shape of the model.
        groups: length, number of rows, and whether they are trees, of each group, in the order of the scoring.
        positions: by group, number of positions at which a token is predicted.
        targets: number of targets.
        embeddings: bytes of the embeddings and the head that are loaded before the first block.
        head: bytes of the same that are loaded at once behind the last block.
        vocabulary: entries of the logits that are computed at once.
        gpu: whether the model runs on a GPU.
        threads: threads of torch, if it runs on a CPU.
        process, held: bytes of the host and of the GPU that the process has before.
    """

    shape: ModelShape
    groups: tuple[tuple[int, int, bool], ...]
    positions: tuple[int, ...]
    targets: int
    embeddings: int
    head: int
    vocabulary: int
    gpu: bool
    threads: int
    process: int
    held: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((length for length, _, _ in self.groups), default=1)


def memory_of_pass(work: Work, room: Room) -> MemoryNeeds:
    """The peaks of a pass."""
    shape, blocks = work.shape, list(dict.fromkeys(work.shape.blocks))
    block, most = max(b.nbytes for b in blocks), max(room.tokens, work.longest)
    near, far = _between(work, room)
    forward = max(forward_bytes(b, shape, work.longest, most) for b in blocks)
    logits = 3 * max(LOGITS[work.gpu], 4 * work.vocabulary) if shape.by_window else _logits_by_row(work)
    picked_near, picked_far = _picked(work, room)
    # Weights go to a GPU through page-locked host memory.
    passing = outside_page_locked(shape) if work.gpu else 0
    numbers = BYTES_PER_TARGET * work.targets + BYTES_PER_TOKEN * sum(length * n for length, n, _ in work.groups)
    others = _next_block(work, room)
    on_device = {
        # Blocks try what rows may hold before there are hidden states of all of them.
        "try": work.embeddings + block + max(forward, shape.loading, trial_bytes(shape)),
        "embed": work.embeddings + near,
        "blocks": block + max(forward, shape.loading) + near,
        "score": work.head + max(logits, shape.quantized) + picked_near,
    }
    on_host = {"try": passing, "embed": passing + far, "blocks": others + far, "score": passing + picked_far}
    process = work.process + numbers
    if not work.gpu:
        batches = {
            n for length, rows, _ in work.groups for n in (min(rows, room.batch(length)), rows % room.batch(length))
        }
        process += libraries_bytes(shape, work.threads, most, batches)
    phases = {}
    for phase in on_device:
        device, host = (1 + SLACK) * on_device[phase], (1 + SLACK) * on_host[phase]
        apart = int(device) + work.held, int(host) + process
        phases[phase] = apart if work.gpu else (0, int(device + host) + process)
    return MemoryNeeds(phases)


def room_for(
    work: Work, limits: dict[str, int], folder: Path | None = None, sharing: int = 1, tokens: int | None = None
) -> tuple[Room, MemoryNeeds]:
    """The room that costs least time among those that fit.

    Args:
        work: the work.
        limits: memory limits of a rank in bytes: "host", and with a GPU "gpu".
        folder: folder for hidden states in a file.
        sharing: number of ranks that share the memory of the host.
        tokens: most tokens in a micro-batch, where an interrupted pass has chosen them; None: as many as fit.

    Raises:
        InputError: none fits; the message names the smallest limit that could.
    """
    remedy = "shorter windows (--seqlen) or texts"
    if tokens is not None:
        remedy = "begin anew (--restart), with fewer tokens at a time"
    choices = ((room, memory_of_pass(work, room)) for room in _rooms(work, folder, tokens))
    return first_that_fits(choices, limits, sharing, remedy)


def _rooms(work: Work, folder: Path | None, tokens: int | None) -> Iterator[Room]:
    """All rooms, those that cost least time first; only those with so many tokens in a micro-batch, if given."""
    most = BATCH_TOKENS["gpu" if work.gpu else "cpu"]
    counts = [most >> n for n in range(5)] if tokens is None else [tokens]
    if work.gpu:
        for place, ahead, count in product(PLACES, (True, False), counts):
            yield Room(count, place, folder, ahead)
    else:
        for ahead, place, count in product((True, False), PLACES[1:], counts):
            yield Room(count, place, folder, ahead)


def _bytes_of_row(work: Work, length: int, tree: bool) -> list[int]:
    """Bytes of each tensor that a row has between two blocks; a tree has a mask."""
    mask = [length * length * work.shape.itemsize] if tree else []
    return [*work.shape.of_stream(length), *work.shape.of_text(length), *mask]


def trial_bytes(shape: ModelShape) -> int:
    """Bytes of a weight that the trial of a block computes with in fp32, where the model has half precision."""
    # Experts that are multiplied in one call are one weight.
    weights = [
        layer.rows * layer.d * (layer.experts if layer.parts >= layer.experts > 0 else 1)
        for block in {*shape.blocks}
        for layer in block.all_layers
    ]
    return 4 * max(weights, default=0) if shape.itemsize < 4 else 0


def _between(work: Work, room: Room) -> tuple[int, int]:
    """Bytes of what lies between two blocks on the device, and on the host beside it."""
    everything, locked, moving = 0, 0, 0
    for length, rows, tree in work.groups:
        sizes, batch = _bytes_of_row(work, length, tree), min(rows, room.batch(length))
        everything += rows * sum(sizes)
        locked += -(-rows // batch) * sum(page_locked_bytes(batch * size) for size in sizes)
        # One is on its way in; two are inputs of the block, and two are on their way out.
        moving = max(moving, 5 * batch * sum(sizes))
    moving = min(moving, everything)
    if not work.gpu:
        return {"host": (everything, 0), "file": (moving, 0)}[room.place]
    return {"gpu": (everything, 0), "host": (moving, locked), "file": (moving, moving)}[room.place]


def _picked(work: Work, room: Room) -> tuple[int, int]:
    """Bytes of what lies behind the last block, while positions are picked out of one group after another."""
    width = work.shape.hidden * work.shape.itemsize
    left = [rows * sum(_bytes_of_row(work, length, tree)) for length, rows, tree in work.groups]
    peak = picked = 0
    for n, positions in enumerate(work.positions):
        picked += positions * width
        peak = max(peak, sum(left[n:]) + picked)
    moving = min(peak, 2 * LOGITS[work.gpu])
    if not work.gpu:
        return {"host": (peak, 0), "file": (moving, 0)}[room.place]
    # Page-locked pieces are powers of two at most twice as large.
    return {"gpu": (peak, 0), "host": (moving, 2 * peak), "file": (moving, moving)}[room.place]


def _logits_by_row(work: Work) -> int:
    return 3 * max(LOGITS[work.gpu], 4 * work.shape.vocabulary)


def _next_block(work: Work, room: Room) -> int:
    """Bytes of the block that is read while another one is worked on, on the host."""
    shape = work.shape
    if work.gpu:
        return max(page_locked_of_block(b, shape) for b in shape.blocks)
    return room.ahead * max(b.nbytes for b in shape.blocks)
