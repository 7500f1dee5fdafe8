"""Bytes of the tensors that torch makes, counted while it runs."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all memory that operations take inside the `with` block of this thread, until it is free.

    Attributes:
        live, peak: bytes now, and the most so far.
        made: bytes of everything that was made.
        points: `live` behind each operation that made something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.made = 0
        self.points: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            # What is written in place, and views, have the memory of an argument.
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
        self.made += nbytes
        self.peak = max(self.peak, self.live)
        self.points.append(self.live)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


@dataclass(frozen=True)
class ForwardBytes:
    """Bytes that a block's forward takes beside its weights and its input, for any number of tokens.

    Attributes:
        live: those at its points, as lines: bytes without tokens, and bytes for each token.
        made: the same of all that it makes.
    """

    live: tuple[tuple[float, float], ...] = ((0, 0),)
    made: tuple[float, float] = (0, 0)

    def peak(self, tokens: int) -> int:
        """The most bytes at once, without gradients."""
        return int(max(fixed + slope * tokens for fixed, slope in self.live))

    def kept(self, tokens: int) -> int:
        """The most bytes that are kept for gradients."""
        return int(self.made[0] + self.made[1] * tokens)


def count_forward(runs: Sequence[tuple[int, Callable[[], object]]]) -> ForwardBytes:
    """The bytes of a block's forward, from runs with one or two numbers of tokens.

    Args:
        runs: the tokens, and a function that runs the block. With a single run no bytes depend on the tokens.
    """
    counts = []
    for _, run in runs:
        with LiveBytes() as count, torch.no_grad():
            run()
        counts.append(count)
    few, more = counts[0], counts[-1]
    tokens = runs[0][0], runs[-1][0]
    # Blocks whose operations depend on the tokens have other points.
    points = zip(few.points, more.points, strict=True) if len(few.points) == len(more.points) else []
    lines = {_line(tokens, pair) for pair in [*points, (few.peak, more.peak)]}
    return ForwardBytes(tuple(sorted(lines)), _line(tokens, (few.made, more.made)))


def _line(tokens: tuple[int, int], counts: tuple[int, int]) -> tuple[float, float]:
    """The line through two counts; neither end of it falls."""
    slope = max(0.0, (counts[1] - counts[0]) / (tokens[1] - tokens[0])) if tokens[1] > tokens[0] else 0.0
    return max(0.0, counts[0] - slope * tokens[0]), slope
