"""repeat: a step that is launched many times, on a GPU as one CUDA graph: no Python between its kernels.

A step of a few rows is over before Python has launched the next one. As a graph it costs the host a copy of the step's
numbers and one launch; the numbers are tensors, which the graph's kernels read as they run.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from . import cpu

# Fewer runs are no graph: its making takes the host a while, how long is not measured.
LEAST = 5


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`; yields after each. See `cpu.repeat`.

    On a GPU, unless the runs are few, the step gets its numbers as tensors () fp32. Its first run compiles and launches
    kernel by kernel, the second is captured, and it and all others are launches of the graph. So no run may wait for
    the GPU, and what one allocates is overwritten by the next. On AMD the end waits: torch does, where a graph goes.

    Args:
        step: launches the same operations on the same tensors every time, whatever its numbers are.
        numbers: (runs, n), what differs from run to run.
        like: a tensor on the device where it all happens.
    """
    if like.device.type != "cuda" or len(numbers) < LEAST:
        yield from cpu.repeat(step, numbers, like)
        return
    # From pinned memory: a copy from other would be waited for.
    host = torch.empty(len(numbers), len(numbers[0]), dtype=torch.float32, pin_memory=True)
    table = host.copy_(torch.tensor(numbers)).to(like.device, non_blocking=True)
    now = torch.empty_like(table[0])
    graph = None
    for run, row in enumerate(table.unbind()):
        now.copy_(row)
        if run:
            graph = graph or _capture(lambda: step(*now.unbind()), like.device)
            graph.replay()
        else:
            step(*now.unbind())
        yield


def _capture(launch: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of what is launched; nothing runs yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        # Other threads may go on with what a capture has to do without. `torch.cuda.graph` would wait for the GPU.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where launches are captured: one stream for good, since torch has few and hands them out again."""
    return torch.cuda.Stream(device)
