"""Ranks: the processes of one run, which `torchrun` starts, each with a GPU of its own.

torch.distributed transfers between them: NCCL between GPUs, gloo between CPUs. Every rank makes the same calls in the
same order. A sum has the same bits on all ranks, and in every run with this number of ranks. A rank that fails ends,
and the launcher then ends the others.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefw.errors import InputError, Say, errors_in_one_line, first_line, invocation, printable, shown, worded

# The triangle of a symmetric matrix is summed in this number of panels of rows, with a buffer for one panel.
PANELS = 16

# A transfer waits this long for the slowest rank: while one rank downloads a model or texts for all, the others may
# wait for hours. The end of a rank is noticed at once all the same.
TIMEOUT = timedelta(hours=12)

# Numbers of the groups that this process joins.
GROUPS = count()

Value = TypeVar("Value")


class LostRankError(RuntimeError):
    """A transfer has failed because another rank has ended."""


@dataclass(eq=False)
class Ranks:
    """Ranks of a run, as seen from one of them.

    Attributes:
        number: index of this rank, from 0.
        count: how many ranks there are.
        here: how many of them are on this machine.
        local: index of this rank on its machine, from 0.
        waited: seconds that the host has waited for transfers.
    """

    number: int = 0
    count: int = 1
    here: int = 1
    local: int = 0
    waited: float = 0

    @property
    def alone(self) -> bool:
        """Tell whether there is no other rank."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Tell whether this is rank 0, which prints for all."""
        return not self.number

    def share(self, total: int) -> slice:
        """Return the slice of a list of `total` items that belongs to this rank, see `shares`."""
        return shares(total, self.count)[self.number]

    def all_reduce(self, tensor: Tensor) -> "Handle":
        """Begin to sum a tensor over all ranks, in place.

        Each of n ranks sends 2 (n - 1) / n of the tensor.
        """
        return self._begin(dist.all_reduce, tensor)

    def reduce(self, owner: int, tensor: Tensor) -> "Handle":
        """Begin to sum a tensor over all ranks, in place on its owner. On the other ranks its values become undefined.

        Each of n ranks sends (n - 1) / n of the tensor, and all but the owner 1 / n more.
        """
        return self._begin(dist.reduce, tensor, owner)

    def reduce_triangle(self, G: Tensor, owner: int | None = None) -> None:
        """Sum a symmetric matrix (d, d) over all ranks, in place. Only the lower triangle is sent and summed.

        Args:
            G: the matrix.
            owner: the rank that needs the sum, see `reduce`; None: all ranks.
        """
        # A panel ends at the diagonal.
        d, height = len(G), -(-len(G) // PANELS)
        for panel in (slice(start, min(d, start + height)) for start in range(0, d, height)):
            packed = G[panel, : panel.stop].contiguous()
            (self.all_reduce(packed) if owner is None else self.reduce(owner, packed)).wait()
            G[panel, : panel.stop] = packed

    def broadcast(self, owner: int, tensor: Tensor) -> "Handle":
        """Begin to copy a tensor of one rank to all others, in place."""
        return self._begin(dist.broadcast, tensor, owner)

    def _begin(self, transfer: Callable[..., Any], tensor: Tensor, *owner: int) -> "Handle":
        if self.alone or not tensor.numel():
            return DONE
        with self.waiting():
            return Handle(self, transfer(tensor, *owner, async_op=True))

    def broadcast_object(self, value: Value) -> Value:
        """Return rank 0's value on all ranks. It is pickled, and should be small."""
        if self.alone:
            return value
        values: list[Any] = [value]
        with self.waiting():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def on_first(self, do: Callable[[], Value]) -> Value:
        """Call a function on rank 0, and return its result on all ranks by `broadcast_object`."""
        return self.broadcast_object(do() if self.first else cast(Value, None))

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in the order of the ranks. They are pickled, and should be small."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.count
        with self.waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all ranks have made this call."""
        self.gather(None)

    def local_first(self, do: Callable[[], Value]) -> Value:
        """Call a function on one rank of each machine, then on the others, which find the files that it has written."""
        if self.local:
            self.barrier()
        result = do()
        if not self.local:
            self.barrier()
        return result

    def agree(self, values: dict[str, Any]) -> None:
        """Refuse different values on different ranks.

        Args:
            values: this rank's values, by their names in the message.

        Raises:
            InputError: on all ranks, naming the first rank and value that differ from rank 0.
        """
        first, *others = self.gather(values)
        for number, other in enumerate(others, 1):
            for name in [*first, *other]:
                if first.get(name) != other.get(name):
                    raise InputError(
                        f"rank {number}: {worded(name)} is {shown(other.get(name), 60)}, and that of rank 0 is "
                        f"{shown(first.get(name), 60)}; start all ranks with the same {invocation()}"
                    )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds of a transfer in the `with` block, and turn its failure into a LostRankError.

        Raises:
            LostRankError: the transfer has failed. Errors of this rank's own GPU stay what they are.
        """
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "cuda error" in str(error):
                raise
            raise LostRankError(f"the connection to another rank broke ({first_line(error)})") from error
        finally:
            self.waited += time.perf_counter() - start


class Handle:
    """Handle of a transfer that has begun. Wait for it before you use its tensor.

    Args:
        ranks: the ranks of the transfer.
        work: torch's handle of the transfer; None: there is nothing to wait for.
    """

    def __init__(self, ranks: Ranks, work: Any = None) -> None:
        self._ranks, self._work = ranks, work

    def wait(self) -> None:
        """Wait for the end of the transfer. On a GPU only the kernels that are launched later wait for it."""
        work, self._work = self._work, None
        if work is not None:
            with self._ranks.waiting():
                work.wait()


ALONE = Ranks()

DONE = Handle(ALONE)


def shares(total: int, count: int, unit: int = 1) -> list[slice]:
    """Divide a list of items into a slice for each rank, as equal as possible.

    Args:
        total: number of items.
        count: number of ranks.
        unit: slices begin at multiples of this. Their lengths differ by at most one unit.
    """
    units = -(-total // unit)
    ends = [min(total, unit * (units * n // count)) for n in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Assign a rank to each item: the most expensive items first, each to the rank with the least work.

    No rank gets more than 4/3 of the work that it has in the best possible assignment (Graham 1969).

    Args:
        costs: cost of each item.
        count: number of ranks.
    """
    work, owners = [0.0] * count, [0] * len(costs)
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[n] = work.index(min(work))
        work[owners[n]] += costs[n]
    return owners


@contextmanager
def joined_with(log: Say) -> Iterator[tuple[Ranks, Say]]:
    """Join the ranks that a launcher has started for the `with` block. Without a launcher the process is alone.

    A process group that the caller has made is used. If the machine has GPUs, each rank takes one.

    Args:
        log: prints a line. Names in lines come from files, so characters that do not print are escaped before.

    Yields:
        The ranks, and a function that logs a line on rank 0 only.

    Raises:
        InputError: the ranks cannot reach each other, or not every rank has a GPU of its own.
    """
    ranks = ALONE

    def say(line: str) -> None:
        if ranks.first:
            log(printable(line))

    made = not dist.is_initialized()
    started = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if not (started if made else dist.get_world_size() > 1):
        yield ranks, say
        return
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available()
    if has_gpu and (made or "LOCAL_RANK" in os.environ):
        # A rank sees all GPUs of its machine, or only its own.
        torch.cuda.set_device(local % torch.cuda.device_count())
    if made:
        with errors_in_one_line("the other ranks cannot be reached", "start with torchrun"):
            # The store outlives a group, and torch would use the same names in it for the next one.
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            store = dist.PrefixStore(f"sparsefw {next(GROUPS)}", store)
            backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), here, local)
    check_gpus(ranks, has_gpu)
    yield ranks, say
    # Not after an error: leaving a group may wait for ever for a lost rank.
    if made:
        dist.destroy_process_group()


def check_gpus(ranks: Ranks, has_gpu: bool) -> None:
    """Refuse ranks of which only some have a GPU, and two ranks on one GPU, where NCCL's message is hard to read.

    Args:
        ranks: the ranks.
        has_gpu: whether this rank has a GPU, the current one.
    """
    gpus = ranks.gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if has_gpu else "")
    for number, gpu in enumerate(gpus):
        if any(gpus) and (not gpu or gpu in gpus[:number]):
            raise InputError(
                f"rank {number} of {len(gpus)} has no GPU of its own: start one rank for each GPU, which sees all of "
                "its machine or only its own (CUDA_VISIBLE_DEVICES)"
            )
