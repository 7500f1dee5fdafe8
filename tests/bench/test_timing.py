"""Times on a GPU hold no time of the host. Pretended clocks of the host and of the GPU show it."""

from itertools import cycle, groupby

import pytest
import timing
import torch


class Clocks:
    """A host that takes time to launch, and a GPU that works through its queue. Times are in seconds."""

    # The sleep is of a cycle, and of the time of the fill.
    CYCLE, FILL = 1e-9, 1e-4

    def __init__(self, patch):
        self.host = self.gpu = 0.0
        self.log = []
        clocks = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                clocks.log.append("event")
                # The GPU gets here once it has done what came before, and not before the host asks for it.
                clocks.gpu = self.at = max(clocks.gpu, clocks.host)

            def query(self):
                return self.at <= clocks.host

            def synchronize(self):
                clocks.host = max(clocks.host, self.at)

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        class Filled:
            def zero_(self):
                clocks.work("fill", clocks.FILL)

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "_sleep", lambda cycles: self.work("sleep", cycles * self.CYCLE))
        patch.setattr(timing, "GPU", True)
        patch.setattr(timing, "_flushed", Filled)

    def work(self, what, seconds, launch=0.0):
        self.log.append(what)
        self.host += launch
        self.gpu = max(self.gpu, self.host) + seconds

    def operation(self, launches, launch, seconds):
        for _ in range(launches):
            self.work("kernel", seconds, launch)


@pytest.fixture
def clocks(monkeypatch):
    return Clocks(monkeypatch)


@pytest.mark.parametrize("launches", [1, 20, 100])
def test_time_of_the_host_does_not_count(launches, clocks):
    """Each kernel takes 10 us, and the host 50 us to launch it: 100 take it longer than the first sleep."""
    watch = timing.Stopwatch(lambda: clocks.operation(launches, 50e-6, 10e-6))
    assert [watch() for _ in range(5)] == pytest.approx([launches * 10e-6] * 5)
    assert watch.late == 0
    assert clocks.log[-4 - launches :] == ["fill", "sleep", "event", *["kernel"] * launches, "event"]


def test_waits_that_remain_are_told(clocks, monkeypatch):
    monkeypatch.setattr(timing, "MOST_CYCLES", timing.CYCLES)
    watch = timing.Stopwatch(lambda: clocks.operation(100, 50e-6, 10e-6))
    assert watch() > 2 * 100 * 10e-6
    assert watch.late == 1


@pytest.fixture
def race(monkeypatch):
    """race(limit, name=seconds of its calls, ...) -> the times of all, by a pretended clock, and the order of calls."""
    now, order = [0.0], []
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def timer(name, seconds):
        def call():
            order.append(name)
            now[0] += (took := next(seconds))
            return took

        return call

    return lambda limit, **rivals: (timing.race({x: timer(x, iter(s)) for x, s in rivals.items()}, limit), order)


def test_a_race_ends_at_its_limit(race):
    """Turns of a short call are as long as one of a long call, and the order of turns rotates."""
    times, order = race(25, short=cycle([0.3, 0.6]), long=cycle([8, 12]))
    assert len(times["long"]) == 3
    assert [name for name, _ in groupby(order)] == ["short", "long", "short", "long"]
    assert len(times["short"]) == 3 * 3
