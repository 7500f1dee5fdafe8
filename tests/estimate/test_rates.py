"""Rates of a device are measured with random operands."""

import torch

from sparsefw.estimate import rates


def test_measured_with_random_operands(monkeypatch):
    """With constant operands a GPU multiplies faster than in a run."""
    multiply, seen = torch.mm, []

    def watched(E, G):
        seen.append((E, G))
        return multiply(E, G)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setattr(rates, "SIZES", {"cpu": (8, 16, 32)})
    monkeypatch.setattr(rates, "COPIED", 1 << 10)
    measured = rates.measured(["bf16", "ieee"], 24, torch.device("cpu"), 5.0)
    assert {X.dtype for pair in seen for X in pair} == {torch.bfloat16, torch.float32}
    for E, G in seen:
        assert (E.shape, G.shape) == ((8, 24), (24, 24))
        assert min(len(E.unique()), len(G.unique())) > 50
    assert set(measured.flops) == {"bf16", "ieee"}
    assert measured.bandwidth > 0
    assert measured.disk == 5.0


def test_the_host_is_waited_for_once_in_a_round(monkeypatch):
    """On a GPU many calls are launched before the host waits, and the time is that of one of them."""
    clock, waits = iter(range(100)), []
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    calls, device = [], torch.device("cuda")
    seconds = rates._fastest(lambda: calls.append(len(waits)), device)
    per_round = len(calls) // len(waits)
    assert per_round >= 10
    assert calls == [n for n in range(len(waits)) for _ in range(per_round)]
    assert seconds == 1 / per_round
