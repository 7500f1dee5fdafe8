"""Spans of time of a run: on the main thread, and on the threads that read the next block and write the last one."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

# Lanes: the main thread, and the threads that read and write beside it.
MAIN, READ, WRITE = "main", "read", "write"

# Phases of the main lane that launch nothing but copies out. The thread that writes these waits for them.
OF_HOST = ("wait", "write")


@dataclass(frozen=True)
class Span:
    """A phase of a block, or of the whole model (block None), in seconds since the model was found."""

    block: int | None
    lane: str
    phase: str
    start: float
    end: float


def of_rank(spans: Iterable[Span], number: int) -> list[Span]:
    """The main lane of another rank, under its own name."""
    return [replace(span, lane=f"rank {number}") for span in spans if span.lane == MAIN]


class Timeline:
    """Collects spans; safe to use from several threads."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self.spans: list[Span] = []

    @contextmanager
    def span(self, phase: str, block: int | None = None, lane: str = MAIN) -> Iterator[None]:
        """Time the work inside. On the main lane that includes what it launches on a GPU, but for copies out."""
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
        """Seconds by phase of one lane, of one block or (None) of all blocks."""
        sums: dict[str, float] = defaultdict(float)
        for span in list(self.spans):
            if span.lane == lane and block in (None, span.block):
                sums[span.phase] += span.end - span.start
        return dict(sums)
