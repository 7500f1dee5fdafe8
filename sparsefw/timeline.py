"""Measure the phases of a run, on the main thread and on the threads that read and write blocks."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

# Lanes: the main thread, the thread that reads the next block, and the thread that writes the last one.
MAIN, READ, WRITE = "main", "read", "write"

# Phases of the main lane that launch only copies from the GPU, for which the writing thread waits.
OF_HOST = ("wait", "write")


@dataclass(frozen=True)
class Span:
    """Phase of a block, or of the whole model (block None), with start and end in seconds since the timeline began."""

    block: int | None
    lane: str
    phase: str
    start: float
    end: float


def of_rank(spans: Iterable[Span], number: int) -> list[Span]:
    """Select the main lane of another rank's spans, and name the lane after the rank."""
    return [replace(span, lane=f"rank {number}") for span in spans if span.lane == MAIN]


class Timeline:
    """Collection of spans, which several threads may use."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self.spans: list[Span] = []

    @contextmanager
    def span(self, phase: str, block: int | None = None, lane: str = MAIN) -> Iterator[None]:
        """Time the work in a `with` block. The main lane also waits for the work that it has launched on a GPU."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if lane == MAIN and phase not in OF_HOST and torch.cuda.is_available():
                torch.cuda.synchronize()
            end = time.perf_counter()
            with self._lock:
                self.spans.append(Span(block, lane, phase, start - self._started, end - self._started))

    def seconds(self, block: int | None = None, lane: str = MAIN) -> dict[str, float]:
        """Sum the seconds of one lane by phase, for one block or (None) for all blocks."""
        sums: dict[str, float] = defaultdict(float)
        for span in list(self.spans):
            if span.lane == lane and block in (None, span.block):
                sums[span.phase] += span.end - span.start
        return dict(sums)
