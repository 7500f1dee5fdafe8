"""Products of an input with matrices, as a block's forward makes them.

There is no list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's
own parameters. So transposed layouts are found, and the experts of a mixture: slices of one 3-D parameter, which are
multiplied one at a time or all at once. Every product is read as a product left @ right.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers.names import WeightNames
from sparsefw.model.tape import Value


@dataclass(frozen=True)
class Reading:
    """How a product reads a tensor.

    Attributes:
        inputs: the axis of the matrix's inputs, counted from the end.
        expert: axis, counted from the end, and index of what is read; None: all is.
    """

    inputs: int = -1
    expert: tuple[int, int] | None = None

    def rows(self, X: Tensor) -> Tensor:
        """The inputs in a tensor, (tokens, in)."""
        if self.expert is not None:
            # It lies before the last two axes.
            X = X.select(*self.expert)
        X = X.movedim(self.inputs, -1)
        return X.reshape(-1, X.shape[-1])


@dataclass(frozen=True)
class Product:
    """A call that multiplies an input with a layer's matrix.

    Attributes:
        layer: the matrix's name in the block.
        X: the tensor that is read.
        reading: how it is read.
        weight: (out, in) view of the matrix.
        bias: (out,), added to the product; None: nothing is.
        alone: whether the call multiplies with nothing else, and the last axis of its output is the matrix's output.
        at_once: whether the call multiplies with other experts, too.
        transposed: whether the columns of the weight are the rows of what is stored.
    """

    layer: str
    X: Any
    reading: Reading
    weight: Tensor
    bias: Any = None
    alone: bool = True
    at_once: bool = False
    transposed: bool = False


# By function that multiplies a left operand with a right one: positions and names of both, and of what is added to the
# product.
_LINEAR = ((0, "input"), (1, "weight"), (2, "bias"))
_CALLS: dict[Any, tuple[tuple[int, str], ...]] = {nn.functional.linear: _LINEAR}
_CALLS |= dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ((0, "input"), (1, "other")))
_CALLS |= dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ((0, "input"), (1, "mat2")))
_CALLS |= dict.fromkeys((torch.addmm, Tensor.addmm), ((1, "mat1"), (2, "mat2"), (0, "input")))
_CALLS |= dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ((1, "batch1"), (2, "batch2"), (0, "input")))

# All functions that multiply tensors, by name. Their output is a combination of their input's entries.
MIXING = {function.__name__ for function in _CALLS}
MIXING |= {"einsum", "tensordot", "bilinear", "outer", "conv1d", "conv2d", "embedding", "scaled_dot_product_attention"}


def products_of(func: Any, args: tuple, kwargs: dict, names: WeightNames) -> list[Product]:
    """The products with matrices of a block that a call makes.

    Args:
        func, args, kwargs: the call: one that is about to be made, or that of an `Op`, whose tape holds the weights and
            biases.
        names: the block's matrices.
    """
    if func not in _CALLS:
        return []
    operands: list[Any] = [args[at] if len(args) > at else kwargs.get(name) for at, name in _CALLS[func]]
    tensors: list[Any] = [x.tensor if isinstance(x, Value) else x for x in operands]
    weights = [isinstance(x, Tensor) and names.is_weight(x) for x in tensors[:2]]
    # A scaled product has no layer's output, and a product of two weights no input.
    if sum(weights) != 1 or {"alpha", "beta"} & kwargs.keys():
        return []
    left = weights[0]
    X, weight = operands[left], tensors[not left]
    linear = func is nn.functional.linear
    if not isinstance(X, Tensor | Value) or not X.dim() or weight.dim() < 2 or (linear and left):
        return []
    matrices = weight if left or linear else weight.mT
    # From the left, a matrix is multiplied with columns.
    inputs = -2 if left and X.dim() > 1 else -1
    added = operands[2] if len(operands) > 2 else None
    alone = inputs == -1 and (added is None or added.dim() == 1)
    bias = tensors[2] if alone and added is not None else None
    found = []
    for product in _products(X, matrices, inputs):
        name, transposed = names.locate(product.weight)
        if name:
            one = alone and not product.at_once
            found.append(replace(product, layer=name, alone=one, bias=bias if one else None, transposed=transposed))
    return found


def _products(X: Tensor | Value, matrices: Tensor, inputs: int) -> Iterator[Product]:
    """The products with matrices (..., out, in), which have an axis for experts where there are several.

    Args:
        X: the input.
        matrices: the matrices.
        inputs: the axis of the input that is multiplied.
    """
    axes = [axis for axis in range(-matrices.dim(), -2) if matrices.shape[axis] > 1]
    if not axes:
        yield Product("", X, Reading(inputs), matrices.flatten(0, -2))
    if len(axes) != 1:
        return
    # An input without an axis for experts is read by all of them. A step of 0 in memory repeats an entry.
    (axis,) = axes
    own = X.dim() >= -axis and X.shape[axis] > 1
    repeated = own and X.stride(axis) == 0
    for n in range(matrices.shape[axis]):
        matrix = matrices.select(axis, n).flatten(0, -2)
        reading = Reading(inputs, (axis, 0 if repeated else n) if own else None)
        yield Product("", X, reading, matrix, at_once=True)
