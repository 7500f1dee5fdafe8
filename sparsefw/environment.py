"""Set the environment variables that libraries read when a process first uses a GPU."""

import os
import platform

# torch reads the settings of its allocator from any of these variables.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_environment() -> None:
    """Set variables that the caller has not set. Commands, `prune` and `evaluate` call this before they use a GPU.

    torch reads CUBLAS_WORKSPACE_CONFIG before its first product on a GPU, and PYTORCH_ALLOC_CONF before its first
    tensor there. If the process has already used the GPU, these settings come too late.
    """
    # For the same bits in every run. Without this setting cuBLAS may choose an algorithm by what else runs, and torch
    # refuses products in its deterministic mode. The value is torch's default on an H100.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # For the same bits in every run: the switch between GPUs may add values in any order.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # Lets freed GPU memory serve tensors of any size, since the stages of a block need different sizes. The driver of
    # WSL (Linux on Windows) does not support this.
    if os.environ.keys().isdisjoint(ALLOCATOR) and "microsoft" not in platform.release():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
