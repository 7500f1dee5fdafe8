"""Count the bytes of a block's forward on windows of two lengths. Other lengths follow by linear interpolation."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsefw.model.tape import tensors_in

# Tokens of the two windows: enough for every kind of attention, and few enough to take little memory.
FEW, MORE = 8, 12


class LinearCount(NamedTuple):
    """A count that grows linearly with the number of tokens.

    Attributes:
        fixed: the count for 0 tokens.
        slope: the amount that each token adds.
    """

    fixed: float
    slope: float = 0

    @classmethod
    def through(cls, few: int, more: int) -> "LinearCount":
        """Fit the line through the counts of the two windows; fixed and slope are at least 0."""
        slope = max(0.0, (more - few) / (MORE - FEW))
        return cls(max(0.0, few - slope * FEW), slope)

    def at(self, tokens: int) -> float:
        """Return the count for a number of tokens."""
        return self.fixed + self.slope * tokens


NOTHING = LinearCount(0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that operations of this thread allocate inside the `with` block.

    Attributes:
        live: allocated bytes that are not freed yet.
        allocated: all bytes that were allocated, freed or not.
        points: the value of `live` after each allocation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.allocated = 0
        self.points: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        for x in tensors_in(out):
            # Views and in-place results share the storage of an argument, so they allocate nothing.
            if x.untyped_storage()._cdata not in before:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it was counted before."""
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += nbytes
        self.allocated += nbytes
        self.points.append(self.live)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def count_forward(runs: Iterable[Callable[[], object]]) -> tuple[tuple[LinearCount, ...], LinearCount]:
    """Count the bytes of a block's forward, besides its weights and its input.

    Args:
        runs: a function for each of the two windows, which runs the window through the block. A single function gives
            counts that do not depend on the tokens.

    Returns:
        The live bytes, and the bytes of all allocations. The live bytes are distinct lines, one for each allocation; or
        one line through the peaks, if the two windows differ in the number of allocations.
    """
    counts = []
    for run in runs:
        with LiveBytes() as count, torch.no_grad():
            run()
        counts.append(count)
    few, more = counts[0], counts[-1]
    if len(few.points) == len(more.points):
        lines = {*map(LinearCount.through, few.points, more.points)}
    else:
        # Some blocks run other operations with more tokens, so that single allocations cannot be compared.
        lines = {LinearCount.through(max(few.points), max(more.points))}
    return tuple(sorted(lines)), LinearCount.through(few.allocated, more.allocated)
