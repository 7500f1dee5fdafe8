"""Ranks: the processes of one run, each with a GPU of its own, which `torchrun` starts.

Transfers are made by torch.distributed: NCCL between GPUs, gloo between CPUs. Every rank makes the same calls in the
same order. A sum has the same bits on all ranks, and in every run of as many ranks. A rank that fails ends: the
launcher, torchrun or another one, then ends the others.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefw.errors import InputError, errors_in_one_line, first_line, invocation, printable, shown, worded

# The triangle of a symmetric matrix is summed in this number of panels of rows. One of them is in a buffer at a time.
PANELS = 16

# How long a transfer may wait for the slowest rank. One rank reads a Hub model or the texts for all, which may take
# hours. A rank that has ended is noticed at once all the same.
TIMEOUT = timedelta(hours=12)

Value = TypeVar("Value")


class LostRankError(RuntimeError):
    """A transfer failed, since another rank has ended."""


@dataclass(eq=False)
class Ranks:
    """The ranks of a run, as one of them sees them.

    Attributes:
        number: of this rank, from 0.
        count: number of the ranks.
        here: number of the ranks on this machine.
        local: number of this rank among them.
        waited: seconds that the host has waited for transfers.
    """

    number: int = 0
    count: int = 1
    here: int = 1
    local: int = 0
    waited: float = 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints for all."""
        return not self.number

    def share(self, total: int, unit: int = 1) -> slice:
        """This rank's share of a row of items, see `shares`."""
        return shares(total, self.count, unit)[self.number]

    def all_reduce(self, tensor: Tensor) -> "Handle":
        """Begin to sum a tensor over all ranks, in place.

        Each rank sends 2 (n - 1) / n of it.
        """
        if self.alone:
            return DONE
        with self.waiting():
            return Handle(self, dist.all_reduce(tensor, async_op=True))

    def reduce(self, owner: int, tensor: Tensor) -> "Handle":
        """Begin to sum a tensor over all ranks, in place on one of them. On the others its values are undefined then.

        Each rank sends (n - 1) / n of it, and all but the owner 1 / n more.
        """
        if self.alone or not tensor.numel():
            return DONE
        with self.waiting():
            return Handle(self, dist.reduce(tensor, owner, async_op=True))

    def reduce_triangle(self, G: Tensor, owner: int | None = None) -> None:
        """Sum a symmetric matrix (d, d) over all ranks, in place. Only the lower triangle is sent and summed.

        Args:
            G: the matrix.
            owner: the rank that needs it, see `reduce`; None: all do.
        """
        if self.alone:
            return
        # A panel ends at the diagonal.
        d, height = len(G), -(-len(G) // PANELS)
        for panel in (slice(start, min(d, start + height)) for start in range(0, d, height)):
            packed = G[panel, : panel.stop].contiguous()
            (self.all_reduce(packed) if owner is None else self.reduce(owner, packed)).wait()
            G[panel, : panel.stop] = packed

    def broadcast(self, owner: int, tensor: Tensor) -> "Handle":
        """Begin to copy a tensor of one rank to all others, in place."""
        if self.alone or not tensor.numel():
            return DONE
        with self.waiting():
            return Handle(self, dist.broadcast(tensor, owner, async_op=True))

    def broadcast_object(self, value: Value) -> Value:
        """The value that rank 0 has. It is pickled, and should be small."""
        if self.alone:
            return value
        values: list[Any] = [value]
        with self.waiting():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def on_first(self, do: Callable[[], Value]) -> Value:
        """Call a function on rank 0; returns what it returns on all ranks, as `broadcast_object`."""
        return self.broadcast_object(do() if self.first else cast(Value, None))

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. They are pickled, and should be small."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.count
        with self.waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        self.gather(None)

    def local_first(self, do: Callable[[], Value]) -> Value:
        """Call a function on one rank of each machine, then on the others: what it leaves on the disk is there then."""
        if self.local:
            self.barrier()
        result = do()
        if not self.local:
            self.barrier()
        return result

    def agree(self, values: dict[str, Any]) -> None:
        """Refuse to go on where ranks have different values, by their names in the message.

        Raises:
            InputError: on all ranks; the message names the first one that differs from rank 0.
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
        """Count the seconds of a transfer, and tell its errors from those of this rank's own GPU.

        Raises:
            LostRankError: the transfer has failed.
        """
        start = time.perf_counter()
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            raise LostRankError(f"the connection to another rank broke ({first_line(error)})") from error
        finally:
            self.waited += time.perf_counter() - start


class Handle:
    """Transfers that have begun. Wait for them before their tensors are used.

    Args:
        ranks: between which they are.
        works: torch's handles of them.
    """

    def __init__(self, ranks: Ranks, *works: Any) -> None:
        self._ranks, self._works = ranks, works

    def wait(self) -> None:
        """On a CPU, wait for the end of the transfers. On a GPU, have what is launched later wait for it."""
        works, self._works = self._works, ()
        if works:
            with self._ranks.waiting():
                for work in works:
                    work.wait()

    @classmethod
    def of_all(cls, handles: "Iterable[Handle]") -> "Handle":
        """One handle for several."""
        listed = list(handles)
        return cls(listed[0]._ranks, *(work for handle in listed for work in handle._works))


ALONE = Ranks()

DONE = Handle(ALONE)


def shares(total: int, count: int, unit: int = 1) -> list[slice]:
    """Equal shares of a row of items, as slices in the order of the ranks.

    Args:
        total: number of the items.
        count: number of the ranks.
        unit: shares begin at multiples of this. They differ by one unit at most, and the last one may end within it.
    """
    units = -(-total // unit)
    ends = [min(total, unit * (units * n // count)) for n in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """The rank of each item that is not divided: the dearest go first, each to the rank with the least work.

    No rank has more than 4/3 of the work of the best possible distribution (Graham 1969).

    Args:
        costs: the cost of each item.
        count: number of the ranks.
    """
    work, owners = [0.0] * count, [0] * len(costs)
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[n] = work.index(min(work))
        work[owners[n]] += costs[n]
    return owners


@contextmanager
def joined_with(log: Callable[[str], None]) -> Iterator[tuple[Ranks, Callable[[str], None]]]:
    """Inside the `with` block, the process is one of the ranks that a launcher has started. Without one it is alone.

    A process group that the caller has made is used. Each rank takes a GPU, where there are any.

    Args:
        log: called with every line. Names in it come from files, so what does not print is spelled out.

    Yields:
        The ranks, and a function that logs a line on rank 0 alone.

    Raises:
        InputError: the ranks do not reach each other, or not every rank has a GPU of its own.
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
    if has_gpu:
        # A rank sees all GPUs of its machine, or its own alone.
        torch.cuda.set_device(local % torch.cuda.device_count())
    if made:
        with errors_in_one_line("the other ranks cannot be reached", "start with torchrun"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), here, local)
    _check_gpus(ranks, has_gpu)
    yield ranks, say
    # Not after an error: to leave a group in which a rank is lost may never end.
    if made:
        dist.destroy_process_group()


def _check_gpus(ranks: Ranks, has_gpu: bool) -> None:
    """Refuse ranks of which some have a GPU and others none, and two on one, which NCCL refuses in its own words."""
    gpus = ranks.gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if has_gpu else "")
    for number, gpu in enumerate(gpus):
        if any(gpus) and (not gpu or gpu in gpus[:number]):
            raise InputError(
                f"rank {number} of {len(gpus)} has no GPU of its own: start one rank for each GPU, which sees all of "
                "its machine or its own alone (CUDA_VISIBLE_DEVICES)"
            )
