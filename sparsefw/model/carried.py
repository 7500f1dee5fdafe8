"""What lies beside the hidden states between two blocks: tensors that later blocks are given, by micro-batch.

Shared keys and values, indices and states of recurrent networks are such tensors. They are placed as hidden states are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.activations import Activations
from sparsefw.model.parts import DIFFERS
from sparsefw.model.values import Constant, leaves_of, rebuilt, tensors_of


@dataclass(frozen=True)
class Stored(Constant):
    """Stands for a tensor that is stored for every micro-batch.

    Attributes:
        number: number of the list that holds it.
        order: its dimensions, in the order in which they lie in memory.
    """

    order: tuple[int, ...]


def dense_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor in the order in which they lie in memory."""
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda n: (-strides[n], n)))


def compact(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor in memory of its own, with its dimensions in the order in which they lie there, and this order."""
    order = dense_order(x)
    lying = x.permute(order)
    if x.untyped_storage().nbytes() != x.nbytes or not lying.is_contiguous():
        # Otherwise a slice would hold all of what it is cut from.
        lying = lying.clone(memory_format=torch.contiguous_format)
    return lying, order


def as_it_was(lying: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tensor that `compact` was given."""
    return lying.permute(sorted(range(len(order)), key=order.__getitem__))


class _Apart:
    """One tensor of all micro-batches from one on, each of any form.

    Args:
        begin: number of the first of these micro-batches.
        kept: an empty list.
    """

    def __init__(self, begin: int, kept: Activations) -> None:
        self.begin, self._kept = begin, kept
        self._orders: list[tuple[int, ...]] = []

    def append(self, x: Tensor, times: int = 1) -> None:
        """Add the tensor of the next micro-batches, which have the same."""
        lying, order = compact(x)
        for _ in range(times):
            self._kept.append(lying)
            self._orders.append(order)

    def __getitem__(self, j: int) -> Tensor:
        """The tensor of micro-batch j, on the device."""
        return as_it_was(self._kept[j - self.begin], self._orders[j - self.begin])

    def close(self) -> None:
        """Let the tensors go."""
        self._kept.close()


class Constants:
    """The tensors that the model's forward makes before its first block, of all micro-batches.

    Those that are equal in all micro-batches are stored once. All streams share them.

    Args:
        new_activations: makes an empty list of micro-batches.
    """

    def __init__(self, new_activations: Callable[..., Activations]) -> None:
        self._new_activations, self._users, self._count = new_activations, 1, 0
        self._shared: list[Tensor] = []
        self._of_batch: set[int] = set()
        self._apart: dict[int, _Apart] = {}

    def append(self, tensors: list[Tensor], of_batch: set[int]) -> None:
        """Add the tensors of a micro-batch.

        Args:
            tensors: the tensors.
            of_batch: numbers of those that are made of what the forward is given.

        Raises:
            InputError: there are more or fewer of them than in the first micro-batch.
        """
        j, self._count = self._count, self._count + 1
        if not j:
            self._shared, self._of_batch = tensors, of_batch
        if len(tensors) != len(self._shared):
            raise InputError(DIFFERS)
        for n, (first, x) in enumerate(zip(self._shared, tensors, strict=True)):
            if n not in self._apart:
                if x is first or (_form(x) == _form(first) and torch.equal(first, x)):
                    continue
                self._begin(n, j, _form(x) == _form(first))
            self._apart[n].append(x)

    def _begin(self, n: int, j: int, same_form: bool) -> None:
        """Store tensor n by micro-batch from micro-batch j on, which is the first that has another one."""
        if not same_form:
            # It may be the last one, which has fewer windows: a copy for each micro-batch before would be in vain.
            self._apart[n] = _Apart(j, self._new_activations())
            return
        self._apart[n] = _Apart(0, self._new_activations())
        self._apart[n].append(self._shared[n], times=j)
        self._shared[n] = self._shared[n].to("meta")

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        """Tensor n of micro-batch j, on the device."""
        j, n = place
        apart = self._apart.get(n)
        return self._shared[n] if apart is None or j < apart.begin else apart[j]

    def made_of_batch(self) -> list[Tensor]:
        """Those tensors of the first micro-batch that may differ from window to window."""
        return [self[0, n] for n in sorted(self._of_batch)]

    def fork(self) -> "Constants":
        """The same object, for one more stream."""
        self._users += 1
        return self

    def close(self) -> None:
        """Let the tensors go when the last stream does."""
        self._users -= 1
        if not self._users:
            for apart in self._apart.values():
                apart.close()
            self._apart = {}


@dataclass
class Held:
    """What one micro-batch has between two blocks.

    Attributes:
        values: tensors by their numbers in the recording.
        boxes: the objects that several blocks are given.
    """

    values: dict[int, Any] = field(default_factory=dict)
    boxes: list[Any] = field(default_factory=list)


class Carried:
    """What lies between two blocks beside the hidden states, of all micro-batches of one stream.

    Args:
        new_activations: makes an empty list of micro-batches.
    """

    def __init__(self, new_activations: Callable[..., Activations]) -> None:
        self._new_activations = new_activations
        self._lists: dict[int, Activations] = {}
        self._forms: dict[int, tuple] = {}
        self._held: list[Held] = []
        # The lists of the tensors that the block at work makes, in the order of the first micro-batch.
        self._new: list[int] = []
        self._next_list = 0

    def append(self, boxes: list[Any]) -> None:
        """Add a micro-batch, with the objects as they are before the first block."""
        self._held.append(Held({}, boxes))

    def held(self, j: int) -> Held:
        """What micro-batch j has, with what stands for the tensors."""
        return self._held[j]

    def tensor(self, j: int, stored: Stored) -> Tensor:
        """A tensor of micro-batch j, on the device."""
        return as_it_was(self._lists[stored.number][j], stored.order)

    def put(self, j: int, held: Held, known: dict[int, Constant]) -> None:
        """Replace what micro-batch j has.

        Args:
            j: number of the micro-batch. They come in order.
            held: what it has now.
            known: what stands for those of its tensors that are stored already, by their ids.

        Raises:
            InputError: the micro-batches before had more or fewer tensors.
        """
        tensors = {id(x): x for x in tensors_of([held.values, held.boxes])}
        kept = _lists_in([known[key] for key in tensors if key in known])
        new = {key: x for key, x in tensors.items() if key not in known}
        if not j:
            self._new = self._lists_for(list(new.values()), sorted(_lists_in(self._held[j]) - kept))
        if len(new) != len(self._new) or kept.intersection(self._new):
            raise InputError(DIFFERS)
        where = dict(known)
        for number, (key, x) in zip(self._new, new.items(), strict=True):
            lying, order = compact(x)
            where[key] = Stored(number, order)
            if j < len(self._lists[number]):
                self._lists[number][j] = lying
            else:
                self._lists[number].append(lying)

        def leaf(x: Any) -> Any:
            return where[id(x)] if isinstance(x, Tensor) else x

        self._held[j] = Held(*rebuilt((held.values, held.boxes), leaf))

    def tensors(self) -> list[Tensor]:
        """All tensors of the first micro-batch that take memory now, on the device."""
        return [self._lists[number][0] for number in sorted(self._lists)]

    def settle(self) -> None:
        """Let the tensors go that no micro-batch has any more."""
        for number in self._lists.keys() - set().union(*map(_lists_in, self._held)):
            self._lists.pop(number).close()

    def fork(self) -> "Carried":
        """A copy that changes independently."""
        copy = Carried(self._new_activations)
        copy._lists = {number: kept.fork() for number, kept in self._lists.items()}
        copy._forms, copy._held, copy._next_list = dict(self._forms), list(self._held), self._next_list
        return copy

    def close(self) -> None:
        """Let the tensors go."""
        for kept in self._lists.values():
            kept.close()
        self._lists = {}

    def _lists_for(self, tensors: list[Tensor], unused: list[int]) -> list[int]:
        """Numbers of lists for new tensors: those of tensors of the same form that are not used any more, or new."""
        numbers = []
        for x in tensors:
            form = _lying_form(x)
            number = next((n for n in unused if self._forms[n] == form), None)
            if number is None:
                number, self._next_list = self._next_list, self._next_list + 1
                self._lists[number], self._forms[number] = self._new_activations(), form
            else:
                unused.remove(number)
            numbers.append(number)
        return numbers


def _lists_in(held: Any) -> set[int]:
    return {x.number for x in leaves_of(held) if isinstance(x, Stored)}


def _form(x: Tensor) -> tuple:
    return x.shape, x.dtype


def _lying_form(x: Tensor) -> tuple:
    return x.permute(dense_order(x)).shape, x.dtype
