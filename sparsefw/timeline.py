"""Measure the phases of a run, on the main thread and on the threads that read and write blocks."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Lanes: the main thread, the thread that reads the next block, and the thread that writes the finished block.
MAIN, READ, WRITE = "main", "read", "write"

# Phases of the main lane that launch only copies from the GPU. The writing thread waits for these copies.
OF_HOST = ("wait", "write")


@dataclass(frozen=True)
class Span:
    """A phase of a block, or of the whole model if block is None; start and end in seconds since the timeline began."""

    block: int | None
    lane: str
    phase: str
    start: float
    end: float


class Timeline:
    """Collects spans; safe for several threads."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.spans: list[Span] = []

    @contextmanager
    def span(self, phase: str, block: int | None = None, lane: str = MAIN) -> Iterator[None]:
        """Time the `with` block. On the main lane this includes work launched on a GPU, except in phases of OF_HOST."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if lane == MAIN and phase not in OF_HOST and torch.cuda.is_available():
                torch.cuda.synchronize()
            end = time.perf_counter()
            # Appending to a list is safe in several threads.
            self.spans.append(Span(block, lane, phase, start - self._started, end - self._started))

    def seconds(self, block: int | None = None) -> dict[str, float]:
        """Sum the seconds of the main lane by phase, for one block, or for everything if block is None."""
        sums: dict[str, float] = defaultdict(float)
        for span in list(self.spans):
            if span.lane == MAIN and block in (None, span.block):
                sums[span.phase] += span.end - span.start
        return dict(sums)
