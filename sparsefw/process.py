"""What memory a process has taken, and what is there."""

import ctypes
import resource
from pathlib import Path

import torch

# Of mallopt, in glibc's malloc.h.
M_ARENA_MAX = -8

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process: resident on the host (file-backed pages counted), and allocated on the GPU."""
    # Not getrusage: that counts the process that started this one, too.
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return {"host_bytes": host, "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def share_freed() -> None:
    """Have all threads allocate from one heap: each would keep up to 64 MiB of what it freed from all others."""
    _c_library("mallopt", M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory; the text and its tokens were many small pieces."""
    _c_library("malloc_trim", 0)


def _c_library(name: str, *numbers: int) -> None:
    """Call a function of the C library, where it has it: memory is used a little better then, and nothing else."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function:
        function(*numbers)


def free_memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process may have in all: "host", with what it has already, and with a GPU "gpu"."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = {"host": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))}
    # In a container; its file cache makes room.
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()) != "max":
        used = {
            name: int(n) for name, n in map(str.split, CGROUP_LIMIT.with_name("memory.stat").read_text().splitlines())
        }
        free["host"] = min(free["host"], int(limit) - used["anon"])
    free["host"] += resident()
    if device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free


def resident() -> int:
    """Bytes of this process that are resident on the host now, file-backed pages counted."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
