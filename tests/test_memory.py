"""The memory that this process has taken, and that it may take."""

import subprocess
import sys

import psutil
import pytest
import torch

from sparsefw import memory
from sparsefw.memory import free_memory, left_by_groups

GIB = 2**30
# No limit in version 1: the largest multiple of a page.
NONE = 2**63 - 4096


@pytest.mark.slow
def test_what_is_given_back_is_not_resident():
    # Run in a process of its own, whose heap has no free space from other tests. Holding the last piece keeps the heap
    # from shrinking by itself.
    code = """
from sparsefw.memory import trim_memory, resident, share_freed
share_freed()
before = resident()
pieces = [bytearray(2**16) for _ in range(4000)]
last = bytearray(2**16)
held = resident()
del pieces
trim_memory()
print(before, held, resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert held - before > 200 * 2**20
    assert after - before < 50 * 2**20


def group(folder, limit, taken):
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.stat").write_text(f"anon {taken}\nfile {9 * taken}\n")


def left(folder, *lines):
    """The least that groups leave to a process that is in these."""
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    return min(left_by_groups(folder / "cgroup", folder / "sys"), default=None)


def test_control_groups(tmp_path):
    """A job of SLURM: the root has no limit, nor has the group itself, and what others hold in the job counts."""
    mine, job = "0::/slurm/job_7/step_0/user", tmp_path / "sys" / "slurm" / "job_7"
    assert left(tmp_path, mine) is None
    group(job / "step_0" / "user", "max", 3 * GIB)
    group(job / "step_0", 70 * GIB, 4 * GIB)
    group(job, 64 * GIB, 9 * GIB)
    # Those beside it do not count.
    group(job / "step_1", GIB, 0)
    assert left(tmp_path, mine) == 55 * GIB
    group(job / "step_0" / "user", 20 * GIB, 3 * GIB)
    assert left(tmp_path, mine) == 17 * GIB
    # In a container, the root of what is seen is the container's group.
    group(tmp_path / "sys", 16 * GIB, 5 * GIB)
    assert left(tmp_path, "0::/") == 11 * GIB


def test_free_memory_is_the_least_of_the_machine_s_and_the_groups(monkeypatch):
    monkeypatch.setattr(memory, "resident", lambda: 1000)
    monkeypatch.setattr(memory, "left_by_groups", lambda: iter([9000, 6000]))
    assert free_memory(torch.device("cpu")) == {"host": 7000}
    assert free_memory(torch.device("cpu"), 3) == {"host": 3000}
    monkeypatch.setattr(memory, "left_by_groups", lambda: iter([]))
    assert free_memory(torch.device("cpu"))["host"] > psutil.virtual_memory().available // 2
