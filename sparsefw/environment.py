"""The environment variables that libraries read when a process first uses a GPU."""

import os
import platform

# Names of the setting of torch's allocator, all of which torch reads.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_environment() -> None:
    """Set what the caller has not set. Commands, `prune` and `evaluate` call this before they use a GPU.

    torch reads the first variable before its first product on a GPU, and the last one before its first tensor there. In
    a process that has done both, this call is too late.
    """
    # The same bits in every run. Without it cuBLAS may choose its algorithm by what else runs, and torch refuses
    # products where the same bits are asked for. The value is torch's own choice on an H100.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The same bits, too: the switch between GPUs may add up in any order.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # The stages of a block take tensors of different sizes. Freed memory of a GPU can then be used for any size. The
    # driver of Windows' Linux fails at it.
    if os.environ.keys().isdisjoint(ALLOCATOR) and "microsoft" not in platform.release():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
