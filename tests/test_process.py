"""Peaks of memory are those of the process itself."""

import subprocess
import sys

import pytest
import torch

from sparsefw.process import host_limit, host_limited, peak_memory, resident, this_device, writable

pytestmark = pytest.mark.slow

SAY = "from sparsefw.process import peak_memory, resident; print(peak_memory()['host_bytes'], resident())"

# Holding the last piece keeps the heap from shrinking by itself.
GIVE_BACK = """
from sparsefw.process import give_back, resident, share_freed
share_freed()
before = resident()
pieces = [bytearray(2**16) for _ in range(4000)]
last = bytearray(2**16)
held = resident()
del pieces
give_back()
print(before, held, resident())
"""


def test_peak_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(2**28)
    assert resident() > 2**30
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True)
    peak, now = map(int, done.stdout.split())
    assert now <= peak < 0.9 * 2**30
    # In this order: to look takes a page, too.
    mine = resident()
    assert peak_memory()["host_bytes"] >= mine > held.nbytes


def test_the_gpu_of_a_rank_has_its_number(monkeypatch):
    """Threads of libraries start with GPU 0, whatever this thread has set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert this_device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_device() == torch.device("cpu")


def test_what_is_given_back_is_not_resident():
    # Run in a process of its own, whose heap has no free space from other tests.
    done = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert held - before > 200 * 2**20
    assert after - before < 50 * 2**20


def test_the_host_is_limited_inside_the_block():
    before = host_limit()
    with host_limited(2**26):
        with host_limited(2**40):
            # What is inside may not take more than what is outside.
            assert host_limit() <= writable() + 2**26
        with pytest.raises(MemoryError):
            bytearray(2**28)
    assert host_limit() == before
    assert len(bytearray(2**28)) == 2**28
