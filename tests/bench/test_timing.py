"""Times on a GPU hold no time of the host, and rivals take turns."""

from itertools import cycle, groupby
from unittest.mock import Mock

import pytest
import timing
import torch


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, which keeps what the host asks of it."""
    gpu = Mock()
    gpu.Event.side_effect = cycle([gpu.started, gpu.ended])
    gpu.started.elapsed_time.return_value = 3.0
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(timing, "_flushed", gpu.flushed)
    monkeypatch.setattr(timing, "GPU", True)
    return gpu


def test_time_of_the_host_does_not_count(gpu):
    """The GPU sleeps until all is launched, at the third try."""
    gpu.started.query.side_effect = [True, True, False]
    watch = timing.Stopwatch(gpu.kernel)
    assert (watch(), watch.late) == (3e-3, 0)
    asked = [name for name, *_ in gpu.mock_calls]
    launched = ["flushed().zero_", "sleep", "started.record", "kernel", "started.query", "ended.record"]
    assert asked[-8:] == [*launched, "ended.synchronize", "started.elapsed_time"]
    assert [call.args[0] for call in gpu.sleep.mock_calls] == [n * timing.CYCLES for n in (1, 2, 4)]
    gpu.started.elapsed_time.assert_called_with(gpu.ended)


def test_waits_that_remain_are_told(gpu, monkeypatch):
    gpu.started.query.return_value = True
    monkeypatch.setattr(timing, "MOST_CYCLES", timing.CYCLES)
    watch = timing.Stopwatch(gpu.kernel)
    assert (watch(), watch.late) == (3e-3, 1)


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
