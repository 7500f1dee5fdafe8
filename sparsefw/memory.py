"""What memory a process has taken, and what is there."""

import platform
import resource

import torch


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process: resident on the host (file-backed pages counted), and allocated on the GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_bytes": host, "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}
