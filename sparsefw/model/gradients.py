"""Gradients of slices of stacked weights, such as those of experts, and gradients with the same bits in every run.

A forward takes `weights[e]` for each expert that has tokens. For each of them torch makes a gradient of all experts,
with zeros for all but one, and adds these gradients up: with E experts, E times the bytes of all weights. Here such a
slice is a leaf of the graph by itself, and its gradient is added to its place in the gradient of all. The bits are the
same: zeros add nothing.

On a GPU some of torch's algorithms add numbers up in the order in which they arrive, such as the gradients of attention
and of convolutions. For nearly all of them torch has deterministic ones, and it can be told to refuse the rest.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Functions that take a part of a tensor. Functions that cut all of it into parts, such as chunk, have one gradient.
_TAKING = {Tensor.__getitem__, Tensor.select, Tensor.narrow, torch.select, torch.narrow}


class SliceGradients(TorchFunctionMode):
    """Make parts of parameters leaves of the graph inside the `with` block.

    Args:
        parameters: parameters whose gradients are wanted, in memory without gaps. A part of a parameter, or of a view
            of it, is a leaf if it lies in the parameter's memory, without gaps, too.

    Attributes:
        leaves: the tensors that get gradients, for `backward(inputs=...)`: the parameters, and all parts so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.leaves: list[Tensor] = [*parameters]
        self._parameters = {id(parameter): parameter for parameter in self.leaves}
        # By the id of the parameter, and the place of the part in memory.
        self._parts: dict[tuple[Any, ...], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        parameter = self._parameter_of(args[0]) if func in _TAKING and args and torch.is_grad_enabled() else None
        if parameter is not None:
            part = func(args[0].detach(), *args[1:], **kwargs)
            # A mask or a list of numbers makes a copy. A gradient has no gaps in memory, and torch warns of others.
            in_place = part.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            if in_place and torch.empty_like(part, device="meta").stride() == part.stride():
                return self._leaf(parameter, part)
        return func(*args, **kwargs)

    def _parameter_of(self, tensor: Tensor) -> Tensor | None:
        """The parameter that a tensor is, or is a view of."""
        return self._parameters.get(id(tensor), self._parameters.get(id(tensor._base)))

    def _leaf(self, parameter: Tensor, part: Tensor) -> Tensor:
        key = id(parameter), part.shape, part.stride(), part.storage_offset()
        if key not in self._parts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._parts[key] = part.requires_grad_()
            # torch adds to a gradient that is there in place.
            offset = part.storage_offset() - parameter.storage_offset()
            part.grad = parameter.grad.as_strided(part.shape, part.stride(), offset)
            self.leaves.append(part)
        return self._parts[key]


@contextmanager
def deterministic(refuse: bool = True) -> Iterator[None]:
    """Let torch use algorithms that give the same bits in every run inside the `with` block.

    Args:
        refuse: whether torch refuses operations without such an algorithm, see `refused`. If not, it makes them as
            usual, and attention, too.
    """
    # Its attributes are made when torch is imported: mypy does not see them.
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        # The caller reports operations that are not refused.
        warnings.filterwarnings("ignore", message=".*deterministic")
        try:
            # torch fills new memory to show reads before writes. That takes time, and gives no other bits.
            memory.fill_uninitialized_memory = False
            torch.set_deterministic_debug_mode("error" if refuse else "warn")
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            memory.fill_uninitialized_memory = fill


def refused(error: BaseException | None) -> str:
    """Name the operation that torch has refused inside `deterministic`; empty if the error has no such cause."""
    while error:
        said = str(error)
        if match := re.match(r"(\w+) does not have a deterministic implementation", said):
            return match[1]
        if isinstance(error, RuntimeError) and "deterministic" in said.lower():
            return "cuBLAS" if "CuBLAS" in said else "an operation"
        error = error.__cause__
    return ""
