"""The memory that this process has taken, and that it may take."""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath

import psutil
import torch

from sparsefw.errors import option

# Number of this option of mallopt in glibc's malloc.h.
M_ARENA_MAX = -8

# The share of free memory that a run leaves to others.
MARGIN = 0.1


def this_device() -> torch.device:
    """The GPU of this process; without one the CPU.

    The GPU has its number: to threads that libraries begin, a GPU without a number is the first one.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_gpu(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a GPU is the current one: limits, peaks of memory, and waits are those of the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process, by name.

    "host_bytes" are resident on the host, file-backed pages counted. "gpu_bytes" are those of tensors on the GPU;
    "gpu_reserved_bytes" are those that torch has taken from the GPU for them. The latter count against a memory limit.
    """
    # getrusage would count the process that started this one, too.
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    here = torch.cuda.is_available()
    return {
        "host_bytes": host,
        "gpu_bytes": torch.cuda.max_memory_allocated() if here else 0,
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if here else 0,
    }


@contextmanager
def gpu_limited(limit: int | None, asked: bool) -> Iterator[None]:
    """Inside the `with` block, torch takes at most `limit` bytes of the current GPU; None: there is no GPU.

    Args:
        limit: the limit that the work is planned for, in bytes.
        asked: whether the user has set it. Otherwise it is what was free, less `MARGIN`, and torch may take half of
            that margin, too: what its kernels take for themselves is in no plan.

    Raises:
        OutOfMemoryError: more was needed; the message is one line.
    """
    if limit is None:
        yield
        return
    if not asked:
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
    """Bytes in GiB: two digits behind the point, or as many as show it."""
    return f"{size / 2**30:.2f}" if size >= 2**30 / 10 else f"{size / 2**30:.1g}"


def share_freed() -> None:
    """Have all threads allocate from one heap; in heaps of their own they keep up to 64 MiB of freed memory each."""
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def trim_memory() -> None:
    """Return freed memory to the system. The C library keeps it otherwise; texts and tokens leave many small pieces."""
    ctypes.CDLL(None).malloc_trim(0)


def pinned_bytes(nbytes: int) -> int:
    """Bytes that torch takes for a tensor of `nbytes` in pinned host memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A tensor on the host, without gaps: itself if it is one.

    One on a GPU is copied to pinned memory while the host goes on. It is there when the GPU gets to an event that is
    recorded on the current stream afterwards. Later work of this stream may overwrite x.
    """
    if x.device.type != "cuda":
        return x.cpu().contiguous()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def release_pinned() -> None:
    """Return freed pinned memory to the system. torch keeps it otherwise, for tensors of the same size.

    The GPU must have finished all copies from it. Locking pages takes about as long as reading them from a disk. So
    memory that is soon needed again is better kept.
    """
    if torch.cuda.is_available():
        # Newer versions of torch have a public name for it.
        public = getattr(torch.accelerator, "empty_host_cache", None)
        (public or torch._C._host_emptyCache)()


def free_memory(device: torch.device, sharing: int = 1) -> dict[str, int]:
    """Bytes that this process may take in all, with those that it has: "host", and with a GPU "gpu".

    Args:
        device: device that it works on.
        sharing: number of processes that share what is free on the host.
    """
    free = {"host": min([psutil.virtual_memory().available, *left_by_groups()]) // sharing + resident()}
    if device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free


def held_on_gpu(device: torch.device) -> int:
    """Bytes that tensors of this process take of a GPU; 0 for the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def resident() -> int:
    """Bytes of this process that are resident on the host now, file-backed pages counted."""
    return psutil.Process().memory_info().rss


def left_by_groups(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that control groups leave to this process: a job's limit, as of SLURM or systemd, or a container's.

    A group's limit holds for all groups below it, too. File cache is not counted as taken: the system drops it. A
    container may see its own group as the root.

    Args:
        groups: the file with the groups of this process: of version 2, and of each controller of version 1.
        mounted: where they are mounted.
    """
    for line in groups.read_text().splitlines() if groups.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, taken = mounted, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            # Its numbers of the groups below are the totals.
            root, limit, taken = mounted / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / group, *(root / above for above in group.parents)):
            # A group without a limit has no such file, or "max" in it.
            try:
                allowed = int((folder / limit).read_text())
                sizes = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            yield allowed - int(sizes.get(taken, 0))
