"""Measure the memory that this process has taken, and the memory that it may take."""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath

import psutil
import torch

from sparsefw.errors import InputError, option

# Number of the option in glibc's malloc.h.
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1

# Share of free memory that a run leaves to other processes.
MARGIN = 0.1


def this_device() -> torch.device:
    """Return the GPU of this process, or the CPU without one.

    The device has the GPU's number. In threads of libraries, "cuda" without a number would mean the first GPU.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_gpu(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one in a `with` block: memory limits, peaks and waits are those of the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def peak_memory() -> dict[str, int]:
    """Return the peak bytes of this process, by name.

    "host_bytes" are the resident bytes on the host, file-backed pages included. "gpu_bytes" are the bytes of tensors on
    the GPU. "gpu_reserved_bytes" are the bytes that torch has taken from the GPU for tensors; memory limits count
    these.
    """
    # getrusage would also count the process that started this one. Without a GPU, torch returns peaks of 0.
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return {
        "host_bytes": host,
        "gpu_bytes": torch.cuda.max_memory_allocated(),
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def highest(*peaks: dict[str, int]) -> dict[str, int]:
    """Return the highest of several peaks, by name, for the names of the first."""
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}


@contextmanager
def bounded(what: str, room: int) -> Iterator[None]:
    """Let this process take at most `room` bytes more in the `with` block, of its address space.

    Raises:
        InputError: the block takes more; the message begins with `what`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(f"{what} takes more than {gib(room)} GiB without its weights") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Bytes of memory: "host", and with a GPU "gpu".
Limits = dict[str, int]


@contextmanager
def gpu_limited(limits: Limits, asked: float | None) -> Iterator[None]:
    """Limit the bytes that torch takes of the current GPU in the `with` block.

    Args:
        limits: the limits in bytes for which the work was planned; without "gpu" there is no GPU.
        asked: the limit that the user has set. If None, it is the free memory less `MARGIN`, and torch may also take
            half of the margin, since no plan counts the memory that kernels take for themselves.

    Raises:
        OutOfMemoryError: the limit was too low; the message is one line.
    """
    limit = limits.get("gpu")
    if limit is None:
        yield
        return
    if asked is None:
        limit = int(limit * (1 - MARGIN / 2) / (1 - MARGIN))
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield
    except torch.OutOfMemoryError as error:
        reserved = torch.cuda.max_memory_reserved() / 2**30
        raise torch.OutOfMemoryError(
            f"{option('gpu_memory', round(limit / 2**30, 2))}: the run needed more of the GPU's memory, after "
            f"{reserved:.2f} GiB; give more, or fewer or shorter windows ({option('nsamples')}, {option('seqlen')})"
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def gib(size: int) -> str:
    """Write bytes in GiB, with two digits after the point, or with one significant digit below 0.1 GiB."""
    return f"{size / 2**30:.2f}" if size >= 2**30 / 10 else f"{size / 2**30:.1g}"


def share_freed() -> None:
    """Make all threads allocate from one heap: in a heap of its own, each would keep up to 64 MiB of freed memory.

    The heap serves tensors of up to 32 MiB, the most that the C library allows, and keeps 64 MiB of freed memory. Else
    the system would give and clear new pages for each of these tensors, which takes a tenth of a run on a CPU.
    """
    for setting, value in {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}.items():
        ctypes.CDLL(None).mallopt(setting, value)


def trim_memory() -> None:
    """Return freed memory to the system, which the C library would keep: texts and tokens leave many small pieces."""
    ctypes.CDLL(None).malloc_trim(0)


def pinned_bytes(nbytes: int) -> int:
    """Count the bytes that torch takes for `nbytes` in pinned host memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def to_host(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor on the host, or the tensor itself if it is one.

    A tensor on a GPU is copied to pinned memory while the host goes on. An event that is recorded on the current stream
    after this call tells when the copy is complete. Later work of this stream may overwrite x.
    """
    if x.device.type != "cuda":
        return x.cpu().contiguous()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def is_full(error: RuntimeError) -> bool:
    """Tell whether an error says that the GPU's memory is full."""
    # CUDA and Triton raise errors of other classes than torch's, which say "out of memory" as well.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def release_pinned() -> None:
    """Return freed pinned memory to the system, which torch would keep for tensors of the same size.

    The GPU must have finished all copies from it. Pinning memory takes about as long as reading it from a disk, so
    memory that is soon needed again is better kept.
    """
    if torch.cuda.is_available():
        # Newer versions of torch have a public function.
        public = getattr(torch.accelerator, "empty_host_cache", None)
        (public or torch._C._host_emptyCache)()


def free_memory(device: torch.device, sharing: int = 1) -> Limits:
    """Return the bytes that this process may take, those that it has included: "host", and with a GPU "gpu".

    Args:
        device: device of this process.
        sharing: number of processes that share the host's free memory.
    """
    free = {"host": min([psutil.virtual_memory().available, *left_by_groups()]) // sharing + resident()}
    if device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free


def held_on_gpu(device: torch.device) -> int:
    """Return the bytes of this process's tensors on a GPU; 0 for the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def resident() -> int:
    """Return the resident bytes of this process on the host, file-backed pages included."""
    return psutil.Process().memory_info().rss


def left_by_groups(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the bytes that each control group leaves to this process: limits of SLURM, systemd or a container.

    The limit of a group holds for all groups below it as well. File cache does not count as taken, since the system
    drops it. A container may see its own group as the root.

    Args:
        groups: file with the group of this process, of version 2.
        mounted: folder where the groups are mounted.
    """
    lines = groups.read_text().splitlines() if groups.exists() else ()
    for line in (x for x in lines if x.startswith("0::")):
        group = PurePosixPath(line.removeprefix("0::").lstrip("/"))
        for folder in (mounted / group, *(mounted / above for above in group.parents)):
            # Without a limit the file is missing or contains "max".
            try:
                allowed = int((folder / "memory.max").read_text())
                sizes = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            yield allowed - int(sizes.get("anon", 0))
