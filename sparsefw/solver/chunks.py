"""Solves rows in chunks whose state fits the memory, on a CPU the caches too, and on a GPU whole waves of tiles."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.kernels.backend import Backend

# The rows of stacks and chunks are multiples of this. A matrix product handles a remainder of rows in another order of
# summation. Without a remainder, a row's result does not depend on the rows beside it.
ROW_UNIT = 64

# The longest chunk on a CPU, in rows, or in entries if that is more rows. A longer chunk does not fit the caches. A
# smaller one leaves too little work between two calls from Python, for which threads wait for each other.
CPU_ROWS, CPU_ENTRIES = 384, 1 << 19

# Rows and columns of a tile of a large product on sm_90 (`kernels/product.py`); chunks are made for it on every GPU.
TILE = (128, 256)

# Memory of a solve per entry of a chunk at its peak, as measured on a CPU (88 with the stack's W and saliency): fp32 W,
# T, the gap between them, M, R, U, E, the fit's Z and R, temporaries of the row step, and bool masks.
BYTES_PER_ENTRY = 80

Result = TypeVar("Result")


def cpu_rows(d: int) -> int:
    """The most rows of d entries that a thread solves at a time on a CPU."""
    return max(CPU_ROWS, CPU_ENTRIES // d // ROW_UNIT * ROW_UNIT)


def wave_rows(rows: int, d: int, most: int, multiprocessors: int, tile: tuple[int, int] = TILE) -> int:
    """The height of chunks with which the products of all chunks take the fewest waves of tiles.

    In a wave every multiprocessor computes a tile, and the last wave of a chunk's product is rarely full. Of heights
    with equally many waves, those with the fewest chunks count, and of these the lowest, which makes chunks equal.

    Args:
        rows: rows of all chunks.
        d: columns of the product.
        most: most rows of a chunk, a multiple of ROW_UNIT. No chunk but the last is less than half as high, since every
            chunk costs launches.
        multiprocessors: of the GPU.
        tile: rows and columns of a tile.
    """
    most = min(most, -(-rows // ROW_UNIT) * ROW_UNIT)
    heights = range(-(-most // (2 * ROW_UNIT)) * ROW_UNIT, most + 1, ROW_UNIT)
    return min(heights, key=lambda height: (waves(rows, d, height, multiprocessors, tile), -(-rows // height), height))


def waves(rows: int, d: int, height: int, multiprocessors: int, tile: tuple[int, int] = TILE) -> int:
    """Waves of tiles of the products of all chunks of a height; arguments as in `wave_rows`."""

    def waves_of(chunk: int) -> int:
        return math.ceil(math.ceil(chunk / tile[0]) * math.ceil(d / tile[1]) / multiprocessors)

    chunks, rest = divmod(rows, height)
    return chunks * waves_of(height) + waves_of(rest)


def by_chunks(
    solve: Callable[[slice], Result], W: Tensor, memory: int | None, name: str, backend: Backend
) -> Iterator[Result]:
    """solve(rows) for chunks of the rows of W, in their order.

    On a CPU as many chunks are solved at once as torch has threads, each on one thread. The operations on a chunk are
    too short to be split over threads, and numpy's selection uses one thread only.

    Args:
        solve: called with the rows of a chunk, on a CPU in another thread.
        W: (rows, d).
        memory: bytes that the state of the chunks may take; None solves all rows at once.
        name: the layer's name, for the error.
        backend: the operations.

    Raises:
        InputError: no chunk fits the memory.
    """
    if not len(W):
        return
    if memory is None:
        yield solve(slice(None))
        return
    threaded = W.device.type == "cpu" and backend.thread_safe
    threads = torch.get_num_threads() if threaded else 1
    height, threads = _height(W, memory, threads, name)
    chunks = [slice(start, start + height) for start in range(0, len(W), height)]
    if not threaded:
        yield from map(solve, chunks)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(solve, chunks)
    finally:
        torch.set_num_threads(before)


def _height(W: Tensor, memory: int, threads: int, name: str) -> tuple[int, int]:
    """The number of rows in a chunk, and the number of threads that the memory allows."""
    d = W.shape[1]
    unit = BYTES_PER_ENTRY * d * ROW_UNIT
    units = memory // unit
    if not units:
        raise InputError(
            f"{name}: a solve needs {unit / 2**30:.3f} GiB at least, and {memory / 2**30:.3f} are set aside"
        )
    threads = min(threads, units)
    if W.device.type == "cpu":
        # All threads get the same number of chunks.
        units = min(units // threads, cpu_rows(d) // ROW_UNIT)
        turns = -(-len(W) // (threads * units * ROW_UNIT))
        units = -(-len(W) // (threads * turns * ROW_UNIT))
        return units * ROW_UNIT, threads
    multiprocessors = torch.cuda.get_device_properties(W.device).multi_processor_count
    return wave_rows(len(W), d, units * ROW_UNIT, multiprocessors), threads
