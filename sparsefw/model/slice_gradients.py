"""Gradients of stacked weights, such as those of experts, at the cost of the slices that a forward takes.

A forward takes `weights[e]` for each expert that has tokens. For each of them torch makes a gradient of all experts,
zeros but for one, and adds those up: with E experts, E times the bytes of all weights. Here a slice is a leaf of the
graph by itself, and its gradient is added to its place in that of the whole. The bits are the same: zeros add nothing.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class SliceGradients(TorchFunctionMode):
    """Inside the `with` block, slices of stacked parameters are leaves of the graph.

    Args:
        parameters: those whose gradients are wanted. A slice that is taken of one with three axes, by one index along
            the first of them, is a leaf.

    Attributes:
        leaves: what gradients are to be computed of, for `backward(inputs=...)`: the parameters, and all slices so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.leaves: list[Tensor] = [*parameters]
        self._stacked = {id(leaf) for leaf in self.leaves if leaf.dim() == 3}
        # By the id of the parameter, and the index.
        self._slices: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__getitem__ and id(args[0]) in self._stacked and _is_one_index(args[1]):
            return self._slice(args[0], operator.index(args[1]))
        return func(*args, **(kwargs or {}))

    def _slice(self, parameter: nn.Parameter, index: int) -> Tensor:
        key = id(parameter), index
        if key not in self._slices:
            leaf = parameter.detach()[index].requires_grad_()
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            # torch adds to a gradient that is there in place.
            leaf.grad = parameter.grad[index]
            self._slices[key] = leaf
            self.leaves.append(leaf)
        return self._slices[key]


def _is_one_index(index: Any) -> bool:
    """Whether an index takes one slice; True and False are masks, and a tensor with an axis makes a copy."""
    if isinstance(index, Tensor):
        return not index.dim() and index.dtype != torch.bool
    return hasattr(index, "__index__") and not isinstance(index, bool)
