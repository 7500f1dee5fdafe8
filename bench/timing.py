"""Time calls whose operands are not in the cache. On a GPU the times hold no time of the host.

A launch costs the host tens of microseconds of Python. A GPU that is idle by then waits for it, and the wait would
count as the kernel's time. So the GPU first sleeps while the host prepares the launches of a call. Before that, a pass
over a large buffer drives the operands out of the cache, that of a CPU, too.
"""

import os
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sparsefw.environment import set_environment

# Before the first tensor on a GPU, as a command does it.
set_environment()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    # Before triton is imported. Without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Bytes of the buffer: more than any cache.
FLUSH = 320 << 20
# Cycles that the GPU sleeps before a call, about a millisecond; and the most, if the host takes longer.
CYCLES, MOST_CYCLES = 2_000_000, 256_000_000

# A mean is steady once its standard error is at most STEADY of it, after at least LEAST calls. A turn has up to TURN.
STEADY, LEAST, TURN = 0.01, 10, 5


@cache
def _flushed() -> Tensor:
    return torch.zeros(FLUSH // 4, device=DEVICE)


def cool(cycles: int = CYCLES) -> None:
    """Drive operands out of the GPU's cache, and let it sleep while the host prepares launches."""
    _flushed().zero_()
    torch.cuda._sleep(cycles)


class Stopwatch:
    """Times calls of run(**setup()).

    Attributes:
        run: the function.
        setup: makes fresh arguments, untimed.
        cycles: cycles that the GPU sleeps before a call.
        late: number of calls that the GPU began before the host had launched all of it, so that their times are too
            long.
    """

    def __init__(self, run: Callable[..., object], setup: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.run, self.setup = run, setup
        self.cycles, self.late = CYCLES, 0

    def __call__(self) -> float:
        """Return the seconds of a call."""
        if not GPU:
            arguments = self.setup()
            _flushed().zero_()
            started = perf_counter()
            self.run(**arguments)
            return perf_counter() - started
        took, waited = self._on_gpu()
        while waited and self.cycles < MOST_CYCLES:
            # The host took longer than the GPU slept.
            self.cycles *= 2
            took, waited = self._on_gpu()
        self.late += waited
        return took

    def _on_gpu(self) -> tuple[float, bool]:
        """Return seconds, and whether the GPU began before the host had launched all of it."""
        arguments = self.setup()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cool(self.cycles)
        started.record()
        self.run(**arguments)
        waited = started.query()
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) / 1e3, waited


def steady(seconds: list[float]) -> bool:
    """Tell whether the mean is known well enough."""
    n = len(seconds)
    return n >= LEAST and statistics.stdev(seconds) / n**0.5 <= STEADY * statistics.mean(seconds)


def race(timers: Mapping[str, Callable[[], float]], limit: float) -> dict[str, list[float]]:
    """Let all timers take turns, until each mean is steady.

    Another one begins each round, so that none always runs after the same other one. A turn has several calls if they
    are short, so that a slow rival leaves time for others.

    Args:
        timers: functions that return the seconds of a call, by name.
        limit: seconds after which no round begins.

    Returns:
        The times of every timer.
    """
    found = {name: [] for name in timers}
    order, end = [*timers], perf_counter() + limit
    while not all(map(steady, found.values())):
        for name in order:
            turn = perf_counter() + limit / 25
            for _ in range(TURN):
                found[name].append(timers[name]())
                if perf_counter() >= turn:
                    break
        order.append(order.pop(0))
        if perf_counter() >= end:
            break
    return found
