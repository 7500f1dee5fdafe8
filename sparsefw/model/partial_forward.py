"""Run a part of a block: begin at tensors of an earlier run, and end at a wanted tensor.

No architecture is named. The calls of torch functions in a block's forward are numbered, and the number of a call
identifies its output. The block's own forward runs from its start, but the calls before the part get meta tensors,
which cost nothing. At the start of the part a given tensor replaces the output of a call. From there on the calls
compute real data.

A trace could not be replayed here, since a block may take another branch in each micro-batch, for example with experts.
"""

import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sparsefw.errors import InputError
from sparsefw.model.tape import Calls, name_of, tensors_in, with_tensors


@dataclass(frozen=True)
class Point:
    """A tensor in a block's forward: the output of a call of a torch function.

    Attributes:
        call: number of the call, from 1; 0 is the block's input.
        function: name of the function.
        path: checksum of the names of all functions up to this call. It differs if the block takes another branch.
    """

    call: int
    function: str = ""
    path: int = 0


UNSUPPORTED = "unsupported model"
DIFFERS = f"{UNSUPPORTED}: a block runs differently from one micro-batch to the next"
CANNOT_RESUME = f"{UNSUPPORTED}: a block cannot resume from its residual stream as it did before"

# The block's input, the hidden states.
INPUT = Point(0)

# Names of functions that return the same values in another shape or precision. They cost next to nothing.
SAME = {"reshape", "view", "dropout", "to", "float"}

# Functions that return the device of a tensor. A meta tensor also returns the real device, so that the block makes new
# tensors, such as positions, with data.
_PLACES = {getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")}

# A cache of the results of calls on meta tensors. Such calls compute nothing, but torch takes 0.2 ms to find the shape
# of a product and 2 ms for attention, and each part of each micro-batch repeats them.
_results: dict[tuple, Any] = {}

# The cache is cleared when it has this number of results. A result takes about a kilobyte.
MOST_RESULTS = 10_000


class ForwardIsOver(Exception):
    """Ends a forward of a block or of the model early."""


def next_point(last: Point, function: Any) -> Point:
    """The point of a call, from the function and the point of the call before."""
    name = name_of(function)
    return Point(last.call + 1, name, zlib.crc32(name.encode(), last.path))


# Runs a micro-batch through a block: called with the block's input, returns the block's output.
RunBlock = Callable[[Tensor], Any]


class _Part:
    """A part of a block's forward while it runs, see `run_part`."""

    def __init__(self, given: dict[Point, Tensor], take: set[Point], end: Point | None) -> None:
        self.last = INPUT
        self._given = {point.call: (point, tensor) for point, tensor in given.items()}
        self.begin, self._take, self._end = max(self._given), take, end
        self._place = next(iter(given.values()))
        # The given tensors whose calls have been reached. A call before the part makes meta tensors of them.
        self._known = [tensor for point, tensor in given.items() if point == INPUT]
        self.taken = {point: tensor for point, tensor in given.items() if point in take}
        # Given and wanted tensors, with their versions (torch's count of writes) when they were given or made.
        self._versions = [(tensor, tensor._version) for tensor in given.values()]

    def unchanged(self) -> bool:
        """Whether no given or wanted tensor has been written to since it was given or made."""
        return all(tensor._version == version for tensor, version in self._versions)

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Handle the next call of the block: compute it, or skip it with meta tensors."""
        point = self.last = next_point(self.last, func)
        out = self._make(func, args, kwargs) if self.begin else func(*args, **kwargs)
        if point.call <= self.begin and point.call in self._given:
            out = self._replaced(point, out)
        if point in self._take:
            if not isinstance(out, Tensor) or out.is_meta:
                raise InputError(DIFFERS)
            self.taken[point] = out
            self._versions.append((out, out._version))
        if point == self._end:
            raise ForwardIsOver
        return out

    def _make(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call in a part that does not begin at the block's input."""
        begun = self.last.call > self.begin
        sources = [x for x in tensors_in((args, kwargs)) if x.is_meta or (not begun and self._is_known(x))]
        if not sources:
            # No input of the call was skipped.
            return func(*args, **kwargs)
        if func in _PLACES:
            return func(self._place)
        if not begun and self.last.function in SAME and self._is_known(sources[0]):
            self._known.append(func(*args, **kwargs))
            return self._known[-1]
        try:
            out = call_without_data(func, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise InputError(CANNOT_RESUME) from error
        # Inside the part a meta tensor may be asked for its shape or dtype, but no tensor may be computed from it.
        if begun and tensors_in(out):
            raise InputError(CANNOT_RESUME)
        return out

    def _is_known(self, x: Tensor) -> bool:
        return any(x is known for known in self._known)

    def _replaced(self, point: Point, out: Any) -> Tensor:
        expected, tensor = self._given[point.call]
        alike = isinstance(out, Tensor) and (out.shape, out.dtype) == (tensor.shape, tensor.dtype)
        if expected != point or not alike:
            raise InputError(DIFFERS)
        self._known.append(tensor)
        return tensor


def run_part(
    run: RunBlock, given: dict[Point, Tensor], take: Iterable[Point] = (), end: Point | None = None
) -> tuple[dict[Point, Tensor], Any]:
    """Run a part of a block.

    Args:
        run: runs the block; called with the block's input.
        given: tensors by point, the hidden states first. The part begins after the latest of these points. It reads no
            other tensor that is made before.
        take: points of the wanted tensors.
        end: the point at which the part ends; None: the end of the block.

    Returns:
        The wanted tensors by point, and the output of the block; None in place of the output if the part ended before.

    Raises:
        InputError: the block has no such points, reads other tensors from before the part, or writes to a given or
            wanted tensor.
    """
    part, output = _Part(given, wanted := set(take), end), None
    if runs := end not in given:
        hidden = given[INPUT] if INPUT in given else next(iter(given.values())).to("meta")
        # Calls are intercepted only where needed: not in a run of the whole block without wanted tensors.
        seen = Calls(part.call) if part.begin or wanted or end else nullcontext()
        # no_grad is entered before `seen`, which would count it as a call.
        with suppress(ForwardIsOver), torch.no_grad(), seen:
            output = run(hidden)
    if (runs and part.last.call < part.begin) or len(part.taken) < len(wanted) or not part.unchanged():
        raise InputError(DIFFERS)
    # The hidden states come first.
    if any(tensor.is_meta for tensor in tensors_in(output)[:1]):
        raise InputError(CANNOT_RESUME)
    return part.taken, output


def call_without_data(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a function with meta tensors in place of tensors, and return its result.

    Args:
        func: a torch function.
        args, kwargs: the function's arguments. They are not changed. Devices among them are replaced by "meta".
    """
    # Reading the tensors' metadata must not count as calls.
    with torch._C.DisableTorchFunction():
        # The key has the arguments' text, since 1, 1.0 and True are equal as keys.
        key = func, torch.get_default_dtype(), repr(with_tensors((args, kwargs), _metadata))
        if key in _results:
            return with_tensors(_results[key], Tensor.detach)

    def to_meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        return value.to("meta") if isinstance(value, Tensor) else value

    args, kwargs = tree_map(to_meta, (args, kwargs))
    operands = tensors_in((args, kwargs))
    versions = [x._version for x in operands]
    out = func(*args, **kwargs)
    written = versions != [x._version for x in operands]
    made = tensors_in(out)
    # A result that is one of the arguments is not cached, since the block may test for identity.
    if made and not written and all(x.is_meta and not any(x is y for y in operands) for x in made):
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = with_tensors(out, Tensor.detach)
    return out


def _metadata(x: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor that the shape and dtype of a result depend on."""
    return type(x), x.dtype, x.layout, tuple(x.shape), x.stride() if x.layout is torch.strided else ()
