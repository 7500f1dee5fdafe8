"""Count the bytes of a block's forward, with windows of two lengths. A line through the counts holds for others."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Tokens of the two windows. They are enough for every kind of attention, and their tensors are small next to a block.
FEW, MORE = 8, 12


class LinearCount(NamedTuple):
    """A count that grows with the tokens.

    Attributes:
        fixed: the count for no token.
        slope: the amount that each token adds.
    """

    fixed: float
    slope: float = 0

    @classmethod
    def through(cls, few: int, more: int) -> "LinearCount":
        """Draw the line through the counts of the two windows; neither end of it falls."""
        slope = max(0.0, (more - few) / (MORE - FEW))
        return cls(max(0.0, few - slope * FEW), slope)

    def at(self, tokens: int) -> float:
        """Return the count for a number of tokens."""
        return self.fixed + self.slope * tokens


NOTHING = LinearCount(0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the memory that operations of this thread take inside the `with` block, until it is free.

    Attributes:
        live: bytes now.
        allocated: bytes of everything that was allocated.
        points: `live` after each operation that allocated something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.allocated = 0
        self.points: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            # Views, and tensors that are written in place, have the memory of an argument.
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, if it is not counted yet."""
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
        runs: functions that run each of the two windows through the block. With a single function, bytes do not depend
            on tokens.

    Returns:
        The bytes that are taken at once after each of its operations, and the bytes of everything that it makes.
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
        # The operations of some blocks depend on the tokens.
        lines = {LinearCount.through(max(few.points), max(more.points))}
    return tuple(sorted(lines)), LinearCount.through(few.allocated, more.allocated)
