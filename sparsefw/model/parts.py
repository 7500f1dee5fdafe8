"""Run a part of a block: begin at tensors that an earlier run has made, and end at one that is wanted.

No architecture is named. The calls of torch functions in a block's forward are numbered, so a tensor is known by the
call that makes it. Calls before the beginning run on meta tensors, which have no data and cost nothing. The output of
the call that the part begins at is replaced by the tensor that is given, and from there on the block really runs.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsefw.errors import InputError


@dataclass(frozen=True)
class Point:
    """A tensor in a block's forward: the output of a call of a torch function.

    Attributes:
        call: number of the call, from 1; 0 is the block's input.
        function: name of the function.
    """

    call: int
    function: str = ""


UNSUPPORTED = "unsupported model"

# The block's input, the hidden states.
INPUT = Point(0)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors among nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class PartIsOver(Exception):
    """Ends a block's forward early."""


class NumberedCalls(TorchFunctionMode):
    """Numbers the calls of torch functions that a block's forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.last = INPUT

    def next_point(self, function: Any) -> Point:
        """The point of the call that is about to be made."""
        self.last = Point(self.last.call + 1, getattr(function, "__name__", str(function)))
        return self.last


class _Part(NumberedCalls):
    """Runs a part of a block, see `run_part`."""

    def __init__(self, given: dict[Point, Tensor], take: Collection[Point], end: Point | None) -> None:
        super().__init__()
        self._given = {point.call: (point, tensor) for point, tensor in given.items()}
        self._begin, self._take, self._end = max(self._given), set(take), end
        # The given tensors of the calls so far. What is made of them before the beginning is a meta tensor, too.
        self._known = [tensor for point, tensor in given.items() if point == INPUT]
        self.taken = {point: tensor for point, tensor in given.items() if point in self._take}

    @property
    def missing(self) -> bool:
        """Whether a wanted tensor was not made."""
        return len(self.taken) < len(self._take)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        point, kwargs = self.next_point(func), kwargs or {}
        if point.call > self._begin:
            out = self._run(func, args, kwargs)
        else:
            if self._depends(args, kwargs):
                args, kwargs = tree_map(_without_data, (args, kwargs))
            out = func(*args, **kwargs)
            if point.call in self._given:
                out = self._replaced(point, out)
        if point in self._take:
            self.taken[point] = out
        if point == self._end:
            raise PartIsOver
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        skipped = any(tensor.is_meta for tensor in tensors_in((args, kwargs)))
        out = func(*args, **kwargs)
        # A shape or a dtype may be asked of any tensor.
        if skipped and tensors_in(out):
            raise InputError(f"{UNSUPPORTED}: a block cannot go on from its residual stream as it did before")
        return out

    def _depends(self, args: tuple, kwargs: dict) -> bool:
        """Whether a call depends on the block's input."""
        return any(x.is_meta or any(x is known for known in self._known) for x in tensors_in((args, kwargs)))

    def _replaced(self, point: Point, out: Any) -> Tensor:
        expected, tensor = self._given[point.call]
        alike = isinstance(out, Tensor) and (out.shape, out.dtype) == (tensor.shape, tensor.dtype)
        if expected != point or not alike:
            raise InputError(f"{UNSUPPORTED}: a block runs differently from one micro-batch to the next")
        self._known.append(tensor)
        return tensor


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def run_part(
    run: Callable[[Tensor], Any], given: dict[Point, Tensor], take: Iterable[Point] = (), end: Point | None = None
) -> tuple[dict[Point, Tensor], Any]:
    """Run a part of a block.

    Args:
        run: runs the block, called with its input.
        given: tensors that the run begins with, the hidden states first. It begins behind the latest of them, and reads
            no other tensor that was made before.
        take: points whose tensors are wanted.
        end: the run ends with this point; None runs to the end of the block.

    Returns:
        The wanted tensors, and what the block returned; None if the run ended before.

    Raises:
        InputError: the block does not make these tensors, or reads others.
    """
    part, output = _Part(given, tuple(take), end), None
    hidden = given[INPUT] if INPUT in given else _without_data(next(iter(given.values())))
    versions = [tensor._version for tensor in given.values()]
    if end is None or end not in given:
        try:
            # Entered first: it is a call, too.
            with torch.no_grad(), part:
                output = run(hidden)
        except PartIsOver:
            pass
    if part.missing or versions != [tensor._version for tensor in given.values()]:
        raise InputError(f"{UNSUPPORTED}: a block runs differently from one micro-batch to the next")
    return part.taken, output
