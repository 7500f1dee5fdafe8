"""One recorded forward: its calls of torch functions, in order, over numbered tensors.

What is to be known of a forward is a function over the list of its operations. In the place of tensors it has values: a
value is a tensor between two writes to it. So it is made once, and never changes.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

# Types of values without tensors inside. They are told by their types: torch's own search, which knows all containers,
# takes ten times as long.
_PLAIN = frozenset(
    [type(None), type(...), bool, int, float, complex, str, slice, torch.Size, torch.dtype, torch.device, torch.layout]
)


class Calls(TorchFunctionMode):
    """Inside the `with` block, every call of a torch function is handed on.

    Args:
        handle: called as handle(function, args, kwargs) in place of the function; returns its result. The calls that it
            makes itself are handed to the modes outside of this one.
    """

    def __init__(self, handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._handle(func, args, kwargs or {})


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a recorded forward, as it is between two writes to it. It has the tensor's form, not its numbers.

    Attributes:
        number: its number.
        maker: number of the operation that has made or written it; 0: the forward is given it; None: it is a constant,
            made by something else.
        shape, strides, dtype: its form.
        tensor: the tensor, if the tape holds it.
    """

    number: int
    maker: int | None
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None = None
    # A tensor counts here how often it was written to.
    _version: ClassVar[int] = 0

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def stride(self, axis: int) -> int:
        """Step in memory along an axis."""
        return self.strides[axis]


@dataclass(frozen=True)
class Op:
    """A call of a torch function.

    Attributes:
        number: its number, from 1.
        function: the function.
        args, kwargs, out: what it is given and returns, with values in the place of tensors.
        inputs, outputs: the values among them, in order. A function may return what it is given.
        written: for each input that it writes to, and for the tensor of which that is a view, the values before and
            after. A tensor that is returned and was written to is among the outputs as it is after.
    """

    number: int
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    out: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    written: tuple[tuple[Value, Value], ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.function)

    @property
    def made(self) -> tuple[Value, ...]:
        """What it returns, and what it has written to."""
        return (*self.outputs, *(after for _, after in self.written))


@dataclass
class Tape:
    """Records a forward: `with Calls(tape.record): ...`.

    Attributes:
        given: the tensors that the forward is given.
        holds: whether the tape holds a tensor, so that it stays in memory, and is found in its value.
        ops: the operations so far.
        paused: whether calls are not recorded.
    """

    given: Iterable[Tensor] = ()
    holds: Callable[[Tensor], bool] = lambda x: False
    ops: list[Op] = field(default_factory=list)
    paused: bool = False
    # By tensor: its value, and how often it had been written to.
    _known: MutableMapping[Tensor, tuple[Value, int]] = field(default_factory=WeakIdKeyDictionary)
    # By the storage of a tensor: the last operation that wrote to it.
    _writer: dict[int, int] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        for x in self.given:
            self._add(x, 0)

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call, and record it."""
        if self.paused:
            return func(*args, **kwargs)
        operands: list[Tensor] = []
        inputs: list[Value] = []

        def known(x: Tensor) -> Value:
            operands.append(x)
            inputs.append(self.value(x))
            return inputs[-1]

        own, others = with_tensors((args, kwargs), known)
        versions = [_version(x) for x in operands]
        out = func(*args, **kwargs)
        number = len(self.ops) + 1
        written = dict[int, tuple[Value, Value]]()
        for x, before, version in zip(operands, inputs, versions, strict=True):
            if _version(x) != version and id(x) not in written:
                self._writer[_storage(x)] = number
                base = x._base
                if base is not None and base in self._known:
                    written[id(base)] = self._known[base][0], self._add(base, number)
                written[id(x)] = before, self._add(x, number)
        outputs: list[Value] = []

        def made(x: Tensor) -> Value:
            outputs.append(self._find(x) or self._add(x, number))
            return outputs[-1]

        result = with_tensors(out, made)
        self.ops.append(Op(number, func, own, others, result, tuple(inputs), tuple(outputs), tuple(written.values())))
        return out

    def value(self, x: Tensor) -> Value:
        """The value of a tensor as it is now. One that was not met before is a constant.

        Outside of `record`, ask for it inside `pause`: a look at a tensor is a call, too.
        """
        if (found := self._find(x)) is not None:
            return found
        # One that is known was written to by another view of its memory.
        return self._add(x, self._writer.get(_storage(x)) if x in self._known else None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside the `with` block, nothing is recorded."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _find(self, x: Tensor) -> Value | None:
        value, version = self._known.get(x, (None, 0))
        return value if version == _version(x) else None

    def _add(self, x: Tensor, maker: int | None) -> Value:
        strides = x.stride() if x.layout is torch.strided else ()
        value = Value(self._count, maker, x.shape, strides, x.dtype, x if self.holds(x) else None)
        self._count += 1
        self._known[x] = value, _version(x)
        return value


def name_of(function: Any) -> str:
    """The name of a torch function."""
    return getattr(function, "__name__", str(function))


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors among nested values, in order."""
    found: list[Tensor] = []
    with_tensors(values, found.append)
    return found


def with_tensors(values: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """Nested values, in tuples, lists, dicts and other containers, with something else in the place of their tensors.

    Args:
        values: what calls of torch functions are given and return.
        leaf: called with every tensor, in order; returns what takes its place.
    """
    kind = type(values)
    if kind in _PLAIN:
        return values
    if isinstance(values, Tensor):
        return leaf(values)
    if kind is tuple or kind is list:
        return kind([with_tensors(value, leaf) for value in values])
    if kind is dict:
        return {key: with_tensors(value, leaf) for key, value in values.items()}
    return tree_map(lambda x: leaf(x) if isinstance(x, Tensor) else x, values)


def _version(x: Tensor) -> int:
    """How often a tensor has been written to. One that was made in inference mode does not tell."""
    return 0 if x.is_inference() else x._version


def _storage(x: Tensor) -> int:
    """Tells apart the storages of tensors that are alive, with or without data."""
    return x.untyped_storage()._cdata
