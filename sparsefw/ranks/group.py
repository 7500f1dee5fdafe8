"""The transfers between the ranks of a run, by torch.distributed: NCCL between GPUs, gloo between CPUs.

Every rank makes the same calls in the same order. A sum has the same bits on all ranks, and in every run of as many
ranks.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefw.errors import InputError, first_line, shown
from sparsefw.ranks.shares import shares
from sparsefw.ranks.voice import Voice

# The triangle of a symmetric matrix is summed in so many panels of rows. Two of them are in buffers at a time.
PANELS = 16

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
        voice: what tells the others how this rank is; None: nothing does.
        waited: seconds that the host has waited for transfers.
        sent: bytes of tensors that this rank has sent, by "sum", "sum_at" and "spread", as rings of ranks take them.
    """

    number: int = 0
    count: int = 1
    here: int = 1
    local: int = 0
    voice: Voice | None = None
    waited: float = 0
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return not self.number

    def share(self, total: int, unit: int = 1) -> slice:
        """This rank's share of things in a row, see `shares`."""
        return shares(total, self.count, unit)[self.number]

    def sum(self, tensor: Tensor) -> "Handle":
        """Begin to sum a tensor over all ranks, in place.

        Each rank sends 2 (n - 1) / n of it.
        """
        if self.alone:
            return DONE
        self.sent["sum"] += sent_of_sum(tensor.nbytes, self.count)
        with self._transfer():
            return Handle(self, dist.all_reduce(tensor, async_op=True))

    def sum_triangle(self, G: Tensor, owner: int | None = None) -> None:
        """Sum a symmetric matrix (d, d) over all ranks, in place. Only the lower triangle is sent and summed.

        Args:
            G: the matrix.
            owner: the rank that needs it, see `sum_at`; None: all do.
        """
        if self.alone:
            return
        pending: tuple[slice, Tensor, Handle] | None = None
        for panel in panels(len(G)):
            packed = G[panel, : panel.stop].contiguous()
            handle = self.sum(packed) if owner is None else self.sum_at(owner, packed)
            if pending:
                _unpack(G, *pending)
            pending = panel, packed, handle
        if pending:
            _unpack(G, *pending)

    def sum_at(self, owner: int, tensor: Tensor) -> "Handle":
        """Begin to sum a tensor over all ranks, in place on one of them. On the others it holds anything afterwards.

        Each rank sends (n - 1) / n of it, and all but the owner 1 / n more.
        """
        if self.alone or not tensor.numel():
            return DONE
        self.sent["sum_at"] += sent_of_sum_at(tensor.nbytes, self.count)
        with self._transfer():
            return Handle(self, dist.reduce(tensor, owner, async_op=True))

    def spread(self, owner: int, tensor: Tensor) -> "Handle":
        """Begin to give all ranks a tensor of one of them, in place."""
        if self.alone or not tensor.numel():
            return DONE
        if owner == self.number:
            self.sent["spread"] += tensor.nbytes
        with self._transfer():
            return Handle(self, dist.broadcast(tensor, owner, async_op=True))

    def gather(self, value: Value) -> list[Value]:
        """The values that all ranks have given, in their order. They are pickled, and should be small."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.count
        with self._transfer():
            dist.all_gather_object(values, value)
        return values

    def one_does(self, do: Callable[[], Value]) -> Value:
        """Call a function on rank 0, which may take hours; returns what it returns on all ranks, as `tell`."""
        result = cast(Value, None)
        if self.first:
            with self.long_work():
                result = do()
        self.meet()
        return self.tell(result)

    def first_here(self, do: Callable[[], Value]) -> Value:
        """Call a function on one rank of each machine, then on the others: what it leaves on the disk is there then.

        It may take hours.
        """
        if self.local:
            self.meet()
        with self.long_work():
            result = do()
        if not self.local:
            self.meet()
        return result

    @contextmanager
    def long_work(self) -> Iterator[None]:
        """Inside the `with` block, this rank may keep the others waiting as long as it lives.

        They must wait for it in `one_does`, `first_here` or `meet`, not in a transfer, whose time is limited.
        """
        with self.voice.long_work() if self.voice else nullcontext():
            yield

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.gather(None)

    def meet(self) -> None:
        """As `wait`, with no transfer that waits: ranks at long work may be late, and may meet in the midst of it."""
        if self.alone or not self.voice:
            self.wait()
            return
        with self._transfer():
            failure = self.voice.meet()
        if failure:
            raise LostRankError(failure.line)

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
                        f"rank {number}: {name} is {shown(other.get(name), 60)}, and that of rank 0 is "
                        f"{shown(first.get(name), 60)}; start all ranks with the same command"
                    )

    def tell(self, value: Value) -> Value:
        """The value that rank 0 has given. It is pickled, and should be small."""
        if self.alone:
            return value
        told: list[Any] = [value]
        with self._transfer():
            dist.broadcast_object_list(told, 0)
        return told[0]

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        if self.voice:
            self.voice.begun += 1
        with self.waiting():
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for others, and tell the errors of transfers from other errors.

        Raises:
            LostRankError: a transfer has failed.
        """
        start = time.perf_counter()
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # Of this rank's own GPU.
            raise
        except RuntimeError as error:
            raise LostRankError(f"the connection to another rank broke ({_said(error)})") from error
        finally:
            self.waited += time.perf_counter() - start


def _said(error: RuntimeError) -> str:
    """The first line of an error. NCCL's say the reason in the last one."""
    first, last = first_line(error), str(error).strip().rpartition("\n")[2]
    return f"{first}; {last}" if isinstance(error, dist.DistBackendError) and last not in first else first


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


def sent_of_sum(nbytes: int, count: int) -> int:
    """Bytes that each of several ranks sends to sum a tensor of so many bytes, in a ring."""
    return 2 * (count - 1) * nbytes // count


def sent_of_sum_at(nbytes: int, count: int) -> int:
    """As `sent_of_sum`, where the sum is made at one rank."""
    return (count - 1) * nbytes // count


def panels(d: int) -> Iterator[slice]:
    """The panels of rows in which the lower triangle of a matrix (d, d) is summed. A panel ends at the diagonal."""
    height = -(-d // PANELS)
    return (slice(start, min(d, start + height)) for start in range(0, d, height))


def _unpack(G: Tensor, panel: slice, packed: Tensor, handle: Handle) -> None:
    handle.wait()
    G[panel, : panel.stop] = packed
