"""Run a part of a block: begin at tensors of an earlier run, and end at a tensor that is wanted.

No architecture is named. The calls of torch functions in a block's forward are numbered, so a tensor is known by the
call that makes it. The block's own forward runs from its start, but calls before the beginning of the part get meta
tensors, which have no data and cost nothing. At the beginning a given tensor replaces the output of the call, and from
there on the block really runs.

A trace is not replayed here: the block may go other ways in another micro-batch, with experts, say.
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
        path: checksum of the names of all functions up to this call. A block that goes another way has other points.
    """

    call: int
    function: str = ""
    path: int = 0


UNSUPPORTED = "unsupported model"
DIFFERS = f"{UNSUPPORTED}: a block runs differently from one micro-batch to the next"
CANNOT_GO_ON = f"{UNSUPPORTED}: a block cannot go on from its residual stream as it did before"

# The block's input, the hidden states.
INPUT = Point(0)

# Names of functions that return the same numbers in another form or precision. They cost next to nothing.
SAME = {"reshape", "view", "dropout", "to", "float"}

# Functions that tell the device of a tensor. Tensors that are made there, such as positions, are real in every part.
_PLACES = {getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")}

# The results of calls without data, by all that they depend on. Such calls compute nothing, but torch takes 0.2 ms to
# find the shape of a product and 2 ms for that of attention, and every part of every micro-batch makes them again.
_results: dict[tuple, Any] = {}

# When there are more results, all are forgotten. One takes about a kilobyte.
MOST_RESULTS = 10_000


class ForwardIsOver(Exception):
    """Ends a forward of a block or of the model early."""


def next_point(last: Point, function: Any) -> Point:
    """The point of a call, from the function and the point of the call before."""
    name = name_of(function)
    return Point(last.call + 1, name, zlib.crc32(name.encode(), last.path))


class _Part:
    """A part of a block's forward while it runs, see `run_part`."""

    def __init__(self, given: dict[Point, Tensor], take: set[Point], end: Point | None) -> None:
        self.last = INPUT
        self._given = {point.call: (point, tensor) for point, tensor in given.items()}
        self.begin, self._take, self._end = max(self._given), take, end
        self._place = next(iter(given.values()))
        # Given tensors, once their calls are reached. Before the beginning, what is made of them is a meta tensor, too.
        self._known = [tensor for point, tensor in given.items() if point == INPUT]
        self.taken = {point: tensor for point, tensor in given.items() if point in take}
        # Given and wanted tensors, with the number of writes to them when they were given or made.
        self._versions = [(tensor, tensor._version) for tensor in given.values()]

    def unchanged(self) -> bool:
        """Whether no given or wanted tensor was written to since."""
        return all(tensor._version == version for tensor, version in self._versions)

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make the next call of the block, or skip it."""
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
            # Nothing that the call depends on was skipped.
            return func(*args, **kwargs)
        if func in _PLACES:
            return func(self._place)
        if not begun and self.last.function in SAME and self._is_known(sources[0]):
            self._known.append(func(*args, **kwargs))
            return self._known[-1]
        try:
            out = call_without_data(func, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise InputError(CANNOT_GO_ON) from error
        # A shape or a dtype may be asked of any tensor.
        if begun and tensors_in(out):
            raise InputError(CANNOT_GO_ON)
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
    run: Callable[[Tensor], Any], given: dict[Point, Tensor], take: Iterable[Point] = (), end: Point | None = None
) -> tuple[dict[Point, Tensor], Any]:
    """Run a part of a block.

    Args:
        run: runs the block, called with its input.
        given: tensors that the run begins with, the hidden states first. It begins after the latest of them, and reads
            no other tensor that was made before.
        take: points whose tensors are wanted.
        end: the run ends with this point; None: with the end of the block.

    Returns:
        The wanted tensors, and the output of the block; None if the run ended before.

    Raises:
        InputError: the block does not make these tensors, reads others, or writes to them.
    """
    part, output = _Part(given, wanted := set(take), end), None
    if runs := end not in given:
        hidden = given[INPUT] if INPUT in given else next(iter(given.values())).to("meta")
        # In a whole run without wanted tensors no call has to be seen.
        seen = Calls(part.call) if part.begin or wanted or end else nullcontext()
        # no_grad is entered first: it is a call, too.
        with suppress(ForwardIsOver), torch.no_grad(), seen:
            output = run(hidden)
    if (runs and part.last.call < part.begin) or len(part.taken) < len(wanted) or not part.unchanged():
        raise InputError(DIFFERS)
    # The hidden states come first.
    if any(tensor.is_meta for tensor in tensors_in(output)[:1]):
        raise InputError(CANNOT_GO_ON)
    return part.taken, output


def call_without_data(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a function with meta tensors in place of tensors, and return its result.

    Args:
        func: a torch function.
        args, kwargs: its arguments. Tensors with data are not touched. The meta device takes the place of a device.
    """
    # Modes would see how tensors are looked at.
    with torch._C.DisableTorchFunction():
        # By their text, since 1, 1.0 and True are equal.
        key = func, torch.get_default_dtype(), repr(with_tensors((args, kwargs), _form))
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
    # Some functions return one of their arguments, and the block may ask whether they did.
    if made and not written and all(x.is_meta and not any(x is y for y in operands) for x in made):
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = with_tensors(out, Tensor.detach)
    return out


def _form(x: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor that the form of a result depends on."""
    return type(x), x.dtype, x.layout, tuple(x.shape), x.stride() if x.layout is torch.strided else ()
