"""The tape of a forward: a list of its calls of torch functions (operations), in order.

Other files read the dataflow of a forward from this list. Operations refer to values in place of tensors. A value is
the state of a tensor between two writes to the tensor. So a value is made once, and never changes.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

# Types without tensors inside. The test of a type is ten times as fast as torch's own search through containers.
_PLAIN = frozenset(
    [type(None), type(...), bool, int, float, complex, str, slice, torch.Size, torch.dtype, torch.device, torch.layout]
)


# Names of functions that return values of a tensor to Python. A forward may branch on these values.
READING = {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "tolist", "numpy"}
READING |= {"equal", "allclose", "is_nonzero", "__array__", "__dlpack__"}


class Calls(TorchFunctionMode):
    """Pass every call of a torch function inside the `with` block to a handler.

    Args:
        handle: called as handle(function, args, kwargs) in place of the torch function; returns the result. This mode
            does not see the calls inside the handler.
    """

    def __init__(self, handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._handle(func, args, kwargs or {})


@dataclass(frozen=True, eq=False)
class TapeValue:
    """The state of a tensor between two writes to the tensor. It has the tensor's shape, but not its data.

    Attributes:
        maker: number of the operation whose result or write the value is; 0 for an argument of the forward; None for a
            constant, which no recorded operation has made.
        shape, strides, dtype: metadata of the tensor.
        tensor: the tensor, if the tape holds it (`Tape.holds`).
    """

    maker: int | None
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None


# The tensors of an operation's inputs, by their values.
Operands = dict[TapeValue, Tensor]


@dataclass(frozen=True)
class Op:
    """An operation: a call of a torch function.

    Attributes:
        number: number of the call, from 1.
        function: the function.
        args, kwargs, out: arguments and result, with values in place of tensors.
        inputs, outputs: the values among the arguments and in the result, in order. A result may be an argument.
        written: (value before, value after) for each input that the call writes to, and for the base of such an input
            if the input is a view. If the call returns such a tensor, `outputs` has the value after the call.
    """

    number: int
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    out: Any
    inputs: tuple[TapeValue, ...]
    outputs: tuple[TapeValue, ...]
    written: tuple[tuple[TapeValue, TapeValue], ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.function)

    @property
    def made(self) -> tuple[TapeValue, ...]:
        """Values that the call has made: its outputs, and the values after its writes."""
        return (*self.outputs, *(after for _, after in self.written))


@dataclass
class Tape:
    """The tape that records a forward: `with Calls(tape.record): ...`.

    Attributes:
        arguments: tensors among the arguments of the forward.
        holds: called with a tensor; returns whether its value keeps the tensor in memory (`TapeValue.tensor`).
        ops: the operations so far.
        paused: whether calls are made without being recorded.
    """

    arguments: Iterable[Tensor] = ()
    holds: Callable[[Tensor], bool] = lambda x: False
    ops: list[Op] = field(default_factory=list)
    paused: bool = False
    # The latest value of each tensor, and the tensor's version (torch's count of writes) at that time.
    _known: MutableMapping[Tensor, tuple[TapeValue, int]] = field(default_factory=WeakIdKeyDictionary)
    # Number of the last operation that wrote to a storage, by the storage's identity.
    _writer: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for x in self.arguments:
            self._add(x, 0)

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call, and record it; returns its result."""
        return self.call(func, args, kwargs)[0]

    def call(
        self, func: Any, args: tuple, kwargs: dict, on_call: Callable[[Op, Operands], None] | None = None
    ) -> tuple[Any, Op | None, Operands]:
        """Make a call, and record it; returns its result, the operation, and the tensors of the operation's inputs.

        While paused there is no operation (None).

        Args:
            func, args, kwargs: the call.
            on_call: called before `func` with the operation, which has no result yet, and with the tensors of its
                inputs. If it raises an error, the call is not made.
        """
        if self.paused:
            return func(*args, **kwargs), None, {}
        operands: list[Tensor] = []
        inputs: list[TapeValue] = []

        def input_value(x: Tensor) -> TapeValue:
            operands.append(x)
            inputs.append(self.value(x))
            return inputs[-1]

        own, others = with_tensors((args, kwargs), input_value)
        versions, number = [_version(x) for x in operands], len(self.ops) + 1
        op = Op(number, func, own, others, None, tuple(inputs), ())
        tensors = dict(zip(inputs, operands, strict=True))
        if on_call:
            on_call(op, tensors)
        out = func(*args, **kwargs)
        written = dict[int, tuple[TapeValue, TapeValue]]()
        for x, before, version in zip(operands, inputs, versions, strict=True):
            if _version(x) != version and id(x) not in written:
                self._writer[_storage(x)] = number
                base = x._base
                if base is not None and base in self._known:
                    written[id(base)] = self._known[base][0], self._add(base, number)
                written[id(x)] = before, self._add(x, number)
        outputs: list[TapeValue] = []

        def output_value(x: Tensor) -> TapeValue:
            outputs.append(self._find(x) or self._add(x, number))
            return outputs[-1]

        result = with_tensors(out, output_value)
        self.ops.append(replace(op, out=result, outputs=tuple(outputs), written=tuple(written.values())))
        return out, self.ops[-1], tensors

    def value(self, x: Tensor) -> TapeValue:
        """Find the present value of a tensor. A tensor that no operation has made or read before is a constant.

        Call this inside `pause`, except during `record`: it reads the tensor's metadata, which would be recorded.
        """
        if (found := self._find(x)) is not None:
            return found
        # If a known tensor has a new version here, another view of its memory was written to.
        return self._add(x, self._writer.get(_storage(x)) if x in self._known else None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing inside the `with` block."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _find(self, x: Tensor) -> TapeValue | None:
        value, version = self._known.get(x, (None, 0))
        return value if version == _version(x) else None

    def _add(self, x: Tensor, maker: int | None) -> TapeValue:
        strides = x.stride() if x.layout is torch.strided else ()
        value = TapeValue(maker, x.shape, strides, x.dtype, x if self.holds(x) else None)
        self._known[x] = value, _version(x)
        return value


def name_of(function: Any) -> str:
    """Name a torch function."""
    return getattr(function, "__name__", str(function))


def tensors_in(values: Any) -> list[Tensor]:
    """List all tensors inside nested containers, in order, with repetitions."""
    found: list[Tensor] = []
    with_tensors(values, found.append)
    return found


def with_tensors(values: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """Copy nested containers (tuples, lists, dicts and others), with a replacement for each tensor.

    Args:
        values: arguments or results of torch functions.
        leaf: called with every tensor, in order; returns the replacement.
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
    return tree_map_only(Tensor, leaf, values)


def _version(x: Tensor) -> int:
    """Count the writes to a tensor; 0 for a tensor of inference mode, for which torch keeps no count."""
    return 0 if x.is_inference() else x._version


def _storage(x: Tensor) -> int:
    """Identify the storage of a tensor, with or without data. Valid as long as the storage is alive."""
    return x.untyped_storage()._cdata
