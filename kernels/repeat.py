"""repeat: run a step many times. On a GPU the step becomes one CUDA graph, without Python between its kernels.

With few rows a kernel ends before Python has launched the next kernel. With a graph the host makes one launch for all
kernels of a run, and copies the numbers of the run to tensors. The kernels read these tensors when they run.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .cpu.steps import repeat as launch_each

# A step with fewer runs is launched kernel by kernel, since the host needs time to make a graph (not measured).
MIN_RUNS = 5


def repeat(step: Callable[..., object], numbers: Sequence[Sequence[float]], like: Tensor) -> Iterator[None]:
    """Run step(*row) for every row of `numbers`, and yield after each run.

    On a GPU, with at least MIN_RUNS runs, the step gets its numbers as tensors () fp32. The first run compiles the
    kernels, and launches them one by one. The second run is captured in a graph, and the graph is launched for this run
    and all later runs. So a run must not wait for the GPU, and overwrites the tensors that the previous run has
    allocated. On AMD the host waits for the GPU in the end, when torch frees the graph.

    Args:
        step: function that launches the same operations on the same tensors for any numbers.
        numbers: (runs, n), the arguments of `step` in every run.
        like: a tensor on the step's device.
    """
    if like.device.type != "cuda" or len(numbers) < MIN_RUNS:
        yield from launch_each(step, numbers, like)
        return
    # The host memory is pinned, since the host would wait for a copy from other memory.
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
    """Capture what `launch` launches in a graph, without running it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        # "thread_local" lets other threads make calls that a capture forbids. `torch.cuda.graph` is not used, since it
        # would wait for the GPU.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for all captures on a device. torch has few streams, so a new one may already be in use."""
    return torch.cuda.Stream(device)
