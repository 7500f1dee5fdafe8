"""Time operations. On a GPU the times hold no time of the host.

A launch costs the host tens of microseconds of Python. A GPU that is idle by then waits for it, and the wait would
count as the kernel's time. So the GPU first sleeps while the host prepares the launches of a round. Before that, a fill
drives the operands out of the cache.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparsefw.environment import set_environment

# Before the first tensor on a GPU, as a command does it.
set_environment()
GPU = torch.cuda.is_available()

# Bytes that are filled before every round: more than any cache.
FLUSH = 256 << 20
# Cycles that the GPU sleeps before a round, about a millisecond; and the most, if the host takes longer.
CYCLES, MOST_CYCLES = 2_000_000, 256_000_000

# A timing makes as many rounds as fit into SECONDS, within the bounds ROUNDS.
SECONDS, ROUNDS = (0.3, (5, 50)) if GPU else (0.0, (3, 3))


class Moment:
    """A point in the GPU's queue. The difference of two is the seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3

    @property
    def passed(self) -> bool:
        """Tell whether the GPU has reached this point."""
        return self.event.query()


@dataclass(frozen=True)
class Times:
    """Seconds of the rounds of a measurement.

    Attributes:
        rounds: seconds of each round.
        late: rounds in which the GPU waited for the host, so that they are too long.
    """

    rounds: list[float]
    late: int = 0

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.rounds)

    def as_dict(self) -> dict[str, float]:
        """Return median, fastest and slowest round in milliseconds, and the numbers of all and of late rounds."""
        return dict(
            ms=1e3 * self.median,
            least_ms=1e3 * min(self.rounds),
            most_ms=1e3 * max(self.rounds),
            rounds=len(self.rounds),
            late=self.late,
        )


@cache
def _flushed(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def keep_busy(cycles: int = CYCLES) -> None:
    """Drive everything out of the GPU's cache, then let it sleep while the host prepares launches."""
    if GPU:
        _flushed(FLUSH).zero_()
        torch.cuda._sleep(cycles)


def rounds_of(seconds: float) -> int:
    """Choose the number of rounds of an operation that takes these seconds."""
    least, most = ROUNDS
    return int(min(max(SECONDS / max(seconds, 1e-9), least), most))


def times(run: Callable[..., object], setup: Callable[[], tuple] = tuple) -> Times:
    """Time run(*setup()); `setup` returns fresh arguments before every round, untimed.

    The first call compiles. The second one tells how many rounds fit.
    """
    run(*setup())
    if not GPU:
        return Times([_on_cpu(run, setup) for _ in range(rounds_of(0.0))])
    first, _ = _on_gpu(run, setup, CYCLES)
    seconds, late, cycles = [], 0, CYCLES
    for _ in range(rounds_of(first)):
        took, waited = _on_gpu(run, setup, cycles)
        while waited and cycles < MOST_CYCLES:
            # The host took longer than the GPU slept.
            cycles *= 2
            took, waited = _on_gpu(run, setup, cycles)
        seconds.append(took)
        late += waited
    return Times(seconds, late)


def _on_cpu(run: Callable[..., object], setup: Callable[[], tuple]) -> float:
    arguments = setup()
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def _on_gpu(run: Callable[..., object], setup: Callable[[], tuple], cycles: int) -> tuple[float, bool]:
    """Time one round; returns seconds, and whether the GPU began it before the host had launched all of it."""
    arguments = setup()
    keep_busy(cycles)
    started = Moment()
    run(*arguments)
    waited = started.passed
    return Moment() - started, waited
