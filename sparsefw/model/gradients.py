"""Gradients of slices of stacked weights, such as experts, and gradients with the same bits in every run.

A forward takes `weights[e]` for each expert e that has tokens. For each such slice torch makes a gradient of the whole
stack, with zeros for all other experts, and adds these gradients up. With E experts this moves E times the bytes of the
stack. Here each slice is a leaf of the autograd graph, and its gradient is a view of its part of the stack's gradient.
The bits are the same, since adding zeros changes nothing.

On a GPU some of torch's algorithms add values in an order that differs between runs, for example in the gradients of
attention and convolutions. For nearly all of these torch also has a deterministic algorithm. torch can refuse the rest.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.errors import InputError

T = TypeVar("T")

# Functions that take one part of a tensor. A function that returns all parts, such as chunk, makes one gradient anyway.
_TAKING = {Tensor.__getitem__, Tensor.select, Tensor.narrow, torch.select, torch.narrow}


class SliceGradients(TorchFunctionMode):
    """Make parts of parameters leaves of the autograd graph inside the `with` block.

    Args:
        parameters: dense (gapless) parameters whose gradients are wanted. A part of a parameter becomes a leaf if it is
            a view of the parameter and itself dense.

    Attributes:
        leaves: the tensors that get gradients, for `backward(inputs=...)`: the parameters, and all parts so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.leaves: list[Tensor] = [*parameters]
        self._parameters = {id(parameter): parameter for parameter in self.leaves}
        # The parts, by the id of their parameter and their place in memory.
        self._parts: dict[tuple[Any, ...], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        parameter = self._parameter_of(args[0]) if func in _TAKING and args and torch.is_grad_enabled() else None
        if parameter is not None:
            part = func(args[0].detach(), *args[1:], **kwargs)
            # An index by a mask or a list makes a copy, which is no part. torch makes dense gradients, and warns if a
            # gradient has other strides than its leaf.
            in_place = part.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            if in_place and torch.empty_like(part, device="meta").stride() == part.stride():
                return self._leaf(parameter, part)
        return func(*args, **kwargs)

    def _parameter_of(self, tensor: Tensor) -> Tensor | None:
        """The parameter to which a tensor is identical, or of which the tensor is a view; None if there is none."""
        return self._parameters.get(id(tensor), self._parameters.get(id(tensor._base)))

    def _leaf(self, parameter: Tensor, part: Tensor) -> Tensor:
        key = id(parameter), part.shape, part.stride(), part.storage_offset()
        if key not in self._parts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._parts[key] = part.requires_grad_()
            # torch accumulates in place into an existing gradient, here into the parameter's.
            offset = part.storage_offset() - parameter.storage_offset()
            part.grad = parameter.grad.as_strided(part.shape, part.stride(), offset)
            self.leaves.append(part)
        return self._parts[key]


@contextmanager
def deterministic(refuse: bool = True) -> Iterator[None]:
    """Let torch use algorithms that give the same bits in every run inside the `with` block.

    Args:
        refuse: whether torch raises an error in operations without such an algorithm, see `refused`. If not, these
            operations run in their usual way, and so does attention.
    """
    # `Any`, since torch adds the attributes of this module at run time, and mypy does not know them.
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        # The caller reports operations that are not refused.
        warnings.filterwarnings("ignore", message=".*deterministic")
        try:
            # torch would fill new memory, to reveal reads of uninitialized memory. That takes time, and is not needed.
            memory.fill_uninitialized_memory = False
            torch.set_deterministic_debug_mode("error" if refuse else "warn")
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            memory.fill_uninitialized_memory = fill


def with_same_bits(work: Callable[[], T], varies: list[str], parameters: Iterable[nn.Parameter] = ()) -> T:
    """Call a function with algorithms that give the same bits in every run, and return its result.

    torch refuses an operation that has no such algorithm. Then the operation's name is appended to `varies`, the
    gradients of the parameters are dropped, and the function is called again with any algorithm. If `varies` has a name
    already, it is called with any algorithm at once.

    Args:
        work: the function. It must be possible to call it again after a failure.
        varies: names of the operations that torch has refused so far.
        parameters: parameters that get gradients.
    """
    if not varies:
        try:
            with deterministic():
                return work()
        except (InputError, RuntimeError) as error:
            operation = refused(error)
            if not operation:
                raise
            varies.append(operation)
            for parameter in parameters:
                parameter.grad = None
    with deterministic(refuse=False):
        return work()


def refused(error: BaseException | None) -> str:
    """Name the operation that torch has refused inside `deterministic`; "" if the error has another cause."""
    while error:
        said = str(error)
        if match := re.match(r"(\w+) does not have a deterministic implementation", said):
            return match[1]
        if isinstance(error, RuntimeError) and "deterministic" in said.lower():
            return "cuBLAS" if "CuBLAS" in said else "an operation"
        error = error.__cause__
    return ""
