"""repeat: run a step many times. On a GPU the step becomes one CUDA graph, without Python between its kernels.

The kernels of a few rows end before Python has launched the next ones. A graph costs the host one launch, and a copy of
the step's numbers. The numbers are tensors, which the kernels of the graph read when they run.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from . import cpu

# Fewer runs are launched kernel by kernel, since the host needs time to make a graph (not measured).
MIN_RUNS = 5


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`, and yield after each.

    On a GPU, with at least MIN_RUNS runs, the step gets its numbers as tensors () fp32. The first run compiles the
    kernels, and launches them one by one. The second run is captured in a graph, which is launched for this and all
    later runs. So a run must not wait for the GPU, and it overwrites the tensors that the run before has allocated. On
    AMD the end waits for the GPU, because torch does so when it frees a graph.

    Args:
        step: launches the same operations on the same tensors every time, whatever its numbers are.
        numbers: (runs, n), the numbers of every run.
        like: a tensor on the step's device.
    """
    if like.device.type != "cuda" or len(numbers) < MIN_RUNS:
        yield from cpu.repeat(step, numbers, like)
        return
    # A copy from memory that is not pinned would wait for the GPU.
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
    """Capture the launches of `launch` in a graph; none of them runs yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        # Other threads may make calls that a capture forbids. `torch.cuda.graph` would wait for the GPU.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for captures: one for the process, since torch has few streams and hands them out again."""
    return torch.cuda.Stream(device)
