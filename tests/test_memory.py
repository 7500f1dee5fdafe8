"""Peaks of memory are those of the process itself."""

import subprocess
import sys

import torch

from sparsefw.memory import give_back, peak_memory, resident, share_freed

SAY = "from sparsefw.memory import peak_memory, resident; print(peak_memory()['host_bytes'], resident())"


def test_peak_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(2**28)
    assert resident() > 2**30
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True)
    peak, now = map(int, done.stdout.split())
    assert now <= peak < 0.9 * 2**30
    assert peak_memory()["host_bytes"] >= resident() > held.nbytes


def test_what_is_given_back_is_not_resident():
    share_freed()
    before = resident()
    pieces = [bytearray(2**16) for _ in range(4000)]
    # Keeps the heap from shrinking by itself.
    last = bytearray(2**16)
    assert resident() - before > 200 * 2**20
    del pieces
    give_back()
    assert resident() - before < 50 * 2**20
    assert len(last) == 2**16
