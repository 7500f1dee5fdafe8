"""Run a part of a block: begin at tensors that an earlier run has made, and end at one that is wanted.

No architecture is named. The calls of torch functions in a block's forward are numbered, so a tensor is known by the
call that makes it. Calls before the beginning run on meta tensors, which have no data and cost nothing. The output of
the call that the part begins at is replaced by the tensor that is given, and from there on the block really runs.
"""

import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_map

from sparsefw.errors import InputError
from sparsefw.model.tape import Calls, name_of, tensors_in, with_tensors


@dataclass(frozen=True)
class Point:
    """A tensor in a block's forward: the output of a call of a torch function.

    Attributes:
        call: number of the call, from 1; 0 is the block's input.
        function: name of the function.
        path: checksum of the names of all functions up to this call. A block that takes another path has other points.
    """

    call: int
    function: str = ""
    path: int = 0


UNSUPPORTED = "unsupported model"
DIFFERS = f"{UNSUPPORTED}: a block runs differently from one micro-batch to the next"
CANNOT_GO_ON = f"{UNSUPPORTED}: a block cannot go on from its residual stream as it did before"

# The block's input, the hidden states.
INPUT = Point(0)

# Functions that give the same numbers in another form or precision, by name. They cost next to nothing.
SAME = {"reshape", "view", "dropout", "to", "float"}

# Functions that say where a tensor is. What is made there, such as positions, is made as in a whole run.
_PLACES = {getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")}

# The results of calls without data, by all that they depend on. Such calls compute nothing, yet torch takes 0.2 ms to
# find the shape of a product and 2 ms for that of attention, and every part of every micro-batch makes them again.
_results: dict[tuple, Any] = {}

# More results are not remembered: they are forgotten, and found again. One takes about a kilobyte.
MOST_RESULTS = 10_000


class PartIsOver(Exception):
    """Ends a block's forward early."""


def next_point(last: Point, function: Any) -> Point:
    """The point of the call of a function that follows another call."""
    name = name_of(function)
    return Point(last.call + 1, name, zlib.crc32(name.encode(), last.path))


class _Part:
    """Runs a part of a block, see `run_part`."""

    def __init__(self, given: dict[Point, Tensor], take: Collection[Point], end: Point | None) -> None:
        self.last = INPUT
        self._given = {point.call: (point, tensor) for point, tensor in given.items()}
        self._begin, self._take, self._end = max(self._given), set(take), end
        self._place = next(iter(given.values()))
        # The given tensors of the calls so far. What is made of them before the beginning is a meta tensor, too.
        self._known = [tensor for point, tensor in given.items() if point == INPUT]
        self.taken = {point: tensor for point, tensor in given.items() if point in self._take}
        # Tensors with data that were to be written to before the beginning, by the address of their storage. The
        # tensors are held, so that no others take their addresses.
        self._outdated: dict[int, Tensor] = {}
        # Given and wanted tensors, and how often they had been written to when they were given or made.
        self._versions = [(tensor, tensor._version) for tensor in given.values()]

    @property
    def is_whole(self) -> bool:
        """Whether the run begins at the block's input, and no tensor inside is wanted."""
        return not self._begin and not self._take

    def check(self) -> None:
        """Raise unless the run began, made what is wanted, and did not write to given and wanted tensors."""
        begun = self.last.call >= self._begin
        unchanged = all(tensor._version == version for tensor, version in self._versions)
        if not begun or len(self.taken) < len(self._take) or not unchanged:
            raise InputError(DIFFERS)

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make the next call of the block, or skip it."""
        point = self.last = next_point(self.last, func)
        if not self._begin:
            # Nothing is skipped.
            out = func(*args, **kwargs)
        elif point.call > self._begin:
            out = self._run(func, args, kwargs)
        else:
            out = self._skip(func, args, kwargs)
            if point.call in self._given:
                out = self._replaced(point, out)
        if point in self._take:
            if not isinstance(out, Tensor) or out.is_meta:
                raise InputError(DIFFERS)
            self.taken[point] = out
            self._versions.append((out, out._version))
        if point == self._end:
            raise PartIsOver
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call behind the beginning."""
        if not any(self._is_skipped(x) for x in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        if func in _PLACES:
            return func(self._place)
        out = self._without_data(func, args, kwargs)
        # A shape or a dtype may be asked of any tensor.
        if tensors_in(out):
            raise InputError(CANNOT_GO_ON)
        return out

    def _skip(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call before the beginning, or the one that the part begins at."""
        sources = [x for x in tensors_in((args, kwargs)) if self._is_skipped(x) or self._is_known(x)]
        if not sources:
            # It does not depend on the block's input.
            return func(*args, **kwargs)
        if func in _PLACES:
            return func(self._place)
        if self.last.function in SAME and self._is_known(sources[0]):
            out = func(*args, **kwargs)
            self._known.append(out)
            return out
        return self._without_data(func, args, kwargs)

    def _is_skipped(self, x: Tensor) -> bool:
        """Whether a tensor has no data, or not those of a whole run."""
        return x.is_meta or (bool(self._outdated) and x.untyped_storage().data_ptr() in self._outdated)

    def _is_known(self, x: Tensor) -> bool:
        return any(x is known for known in self._known)

    def _without_data(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of a function for tensors without data."""
        try:
            out, written = call_without_data(func, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise InputError(CANNOT_GO_ON) from error
        self._outdated |= {tensor.untyped_storage().data_ptr(): tensor for tensor in written}
        return out

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
        given: tensors that the run begins with, the hidden states first. It begins behind the latest of them, and reads
            no other tensor that was made before.
        take: points whose tensors are wanted.
        end: the run ends with this point; None runs to the end of the block.

    Returns:
        The wanted tensors, and what the block returned; None if the run ended before.

    Raises:
        InputError: the block does not make these tensors, reads others, or writes to them.
    """
    part, output = _Part(given, tuple(take), end), None
    if end is None and part.is_whole:
        # No call has to be seen.
        with torch.no_grad():
            output = run(given[INPUT])
        part.check()
        return {}, output
    hidden = given[INPUT] if INPUT in given else next(iter(given.values())).to("meta")
    if end is None or end not in given:
        try:
            # Entered first: it is a call, too.
            with torch.no_grad(), Calls(part.call):
                output = run(hidden)
        except PartIsOver:
            pass
        part.check()
        # The hidden states come first.
        if any(tensor.is_meta for tensor in tensors_in(output)[:1]):
            raise InputError(CANNOT_GO_ON)
    elif len(part.taken) < len(set(take)):
        raise InputError(DIFFERS)
    return part.taken, output


def call_without_data(func: Any, args: tuple, kwargs: dict) -> tuple[Any, list[Tensor]]:
    """Call a function with meta tensors in place of its tensors.

    Args:
        func: a torch function.
        args, kwargs: what it is given. Tensors with data are not touched, and a device is taken for the meta device.

    Returns:
        What the function returns, and those of the tensors with data that it would have written to.
    """
    # Modes would see how tensors are looked at.
    modes = tuple(type(mode) for mode in _get_current_function_mode_stack())
    with torch._C.DisableTorchFunction():
        # Values are told by how they are written: 1, 1.0 and True are equal.
        key = func, modes, torch.get_default_dtype(), repr(with_tensors((args, kwargs), _form))
        if key in _results:
            return with_tensors(_results[key], _like), []
    copies: list[tuple[Tensor, Tensor]] = []

    def to_meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        copies.append((value, value.to("meta")))
        return copies[-1][1]

    args, kwargs = tree_map(to_meta, (args, kwargs))
    operands = tensors_in((args, kwargs))
    versions = {id(x): x._version for x in operands}
    out = func(*args, **kwargs)
    written = {id(x) for x in operands if x._version != versions[id(x)]}
    made = tensors_in(out)
    # Some functions return what they are given, and it may be asked whether they do.
    if made and not written and all(_is_plain(x) and not any(x is y for y in operands) for x in made):
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = with_tensors(out, Tensor.detach)
    return out, [tensor for tensor, copy in copies if id(copy) in written]


def _form(x: Tensor) -> tuple[Any, ...]:
    """All of a tensor that the form of a result depends on."""
    return type(x), x.dtype, x.layout, tuple(x.shape), x.stride() if x.layout is torch.strided else ()


def _is_plain(x: Tensor) -> bool:
    """Whether there is no more to a tensor than its size, steps and dtype."""
    return type(x) is Tensor and x.is_meta and x.layout is torch.strided and not x.requires_grad


def _like(x: Tensor) -> Tensor:
    """Such a tensor. A view becomes a tensor of its own: there is no data that it could share."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
