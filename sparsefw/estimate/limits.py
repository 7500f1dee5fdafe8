"""Memory limits, and the choice among what fits them."""

import math
from collections.abc import Iterable
from typing import TypeVar

import torch

from sparsefw import memory
from sparsefw.errors import InputError
from sparsefw.estimate.memory import GIB, MemoryNeeds
from sparsefw.memory import MARGIN
from sparsefw.ranks import ALONE, Ranks

Choice = TypeVar("Choice")

# The same run takes a little more or less each time: bytes, a little more than the 6 MiB that were measured.
VARIATION = 8 * 2**20


def memory_limits(
    gpu_memory: float | None, host_memory: float | None, device: torch.device, ranks: Ranks = ALONE
) -> dict[str, int]:
    """Memory limits of this process in bytes: "host", and with a GPU "gpu"; the lowest ones of all ranks.

    Args:
        gpu_memory, host_memory: limits that the user has given, in GiB; None: what is free, less a tenth.
        device: device that it works on.
        ranks: the ranks on a machine share its memory.

    Raises:
        InputError: there is a limit for a GPU, and no GPU.
    """
    free = memory.free_memory(device, ranks.here)
    if gpu_memory is not None and "gpu" not in free:
        raise InputError("--gpu-memory: no CUDA device")
    given = {"gpu": gpu_memory, "host": host_memory and host_memory / ranks.here}
    limits = {
        what: int(size * (1 - MARGIN) if (gib := given[what]) is None else gib * GIB) for what, size in free.items()
    }
    everywhere = ranks.gather(limits)
    return {what: min(other[what] for other in everywhere) for what in limits}


def first_that_fits(
    choices: Iterable[tuple[Choice, MemoryNeeds]], limits: dict[str, int], sharing: int, remedy: str
) -> tuple[Choice, MemoryNeeds]:
    """The first choice whose needs fit.

    Args:
        choices: the choices, the best first, with what each needs.
        limits: memory limits of a rank in bytes: "host", and with a GPU "gpu".
        sharing: number of ranks that share the memory of the host.
        remedy: what the user can give beside more memory.

    Raises:
        InputError: none fits; the message names the smallest limit that could.
    """
    tried = []
    for choice, needs in choices:
        if needs.gpu <= limits.get("gpu", 0) and needs.host <= limits["host"]:
            return choice, needs
        tried.append(needs)
    for what in ("gpu", "host"):
        limit = limits.get(what, 0)
        least = min(getattr(needs, what) for needs in tried)
        if least > limit:
            # The user's limit for the host is that of all ranks on a machine.
            among = sharing if what == "host" else 1
            # Rounded up, so that the limit that is named is enough.
            enough = math.ceil(100 * among * (least + VARIATION) / GIB) / 100
            memory = f"{what.replace('gpu', 'GPU')} memory{f' for {among} ranks' if among > 1 else ''}"
            raise InputError(
                f"--{what}-memory {among * limit / GIB:.2f}: this run needs at least {enough:.2f} GiB of "
                f"{memory}; give more, or {remedy}"
            )
        tried = [needs for needs in tried if getattr(needs, what) <= limit]
    raise AssertionError("a choice fits each limit, and none fits both")
