"""Products of an input with matrices, as a block's forward makes them.

There is no list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's
own parameters. So transposed layouts are found, and the experts of a mixture: slices of one 3-D parameter, which are
multiplied one at a time or all at once. Every product is read as an equation like that of `einsum`, which names the
axes that the input, the weight and the output share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers.names import WeightNames
from sparsefw.model.tape import Value

# Stands for any number of axes that only the input and the output have.
_ELLIPSIS = "..."

# Labels for axes that a call does not name.
_UNNAMED = "0123456789"


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
        inputs = self.inputs
        if self.expert is not None:
            axis, index = self.expert
            X = X.select(axis, index)
            inputs += inputs < axis
        X = X.movedim(inputs, -1)
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
    if func is not torch.einsum and func not in _CALLS:
        return []
    equation, operands, bias = _equation_of(func, args, kwargs)
    tensors: list[Any] = [x.tensor if isinstance(x, Value) else x for x in operands]
    weights = [isinstance(x, Tensor) and names.is_weight(x) for x in tensors]
    # A scaled product has no layer's output, and a product of two weights no input.
    if not equation or sum(weights) != 1 or {"alpha", "beta"} & kwargs.keys():
        return []
    at = weights.index(True)
    labels, out = equation
    found = []
    for product in _products((operands[1 - at], labels[1 - at]), (tensors[at], labels[at]), out, bias):
        name, transposed = names.locate(product.weight)
        if name:
            held = product.bias.tensor if isinstance(product.bias, Value) else product.bias
            found.append(replace(product, layer=name, bias=held, transposed=transposed))
    return found


def _equation_of(func: Any, args: tuple, kwargs: dict) -> tuple[tuple[list[str], str] | None, list[Any], Any]:
    """The labels of the axes of both operands and of the output, the operands, and what is added.

    The labels are None for calls that are not of two tensors, or not written so.
    """
    if func is torch.einsum:
        if not isinstance(args[0], str):
            return None, [], None
        operands = list(args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else list(args[1:])
        return _einsum_labels(args[0], operands), operands, None
    given = [args[at] if len(args) > at else kwargs.get(name) for at, name in _CALLS[func]]
    operands, bias = given[:2], given[2] if len(given) > 2 else None
    if not all(isinstance(x, Tensor | Value) and x.dim() for x in operands):
        return None, operands, bias
    if func is nn.functional.linear:
        return (["...i", "oi"], "...o"), operands, bias
    return _matmul_labels(*operands), operands, bias


def _matmul_labels(left: Tensor | Value, right: Tensor | Value) -> tuple[list[str], str]:
    """The labels of a product left @ right: the axes before the last two go together from the end."""
    batch = _UNNAMED[: max(left.dim(), right.dim(), 2) - 2]
    labels = []
    for x, last in ((left, "ti"), (right, "io")):
        own = last if x.dim() > 1 else "i"
        labels.append(batch[len(batch) - (x.dim() - len(own)) :] + own)
    return labels, batch + "t" * (left.dim() > 1) + "o" * (right.dim() > 1)


def _einsum_labels(equation: str, operands: list[Any]) -> tuple[list[str], str] | None:
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if len(operands) != 2 or len(labels) != 2:
        return None
    if not arrow:
        letters = inputs.replace(",", "").replace(_ELLIPSIS, "")
        out = _ELLIPSIS * (_ELLIPSIS in inputs) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    return labels, out


def _products(
    read: tuple[Tensor | Value, str], multiplied: tuple[Tensor, str], out: str, bias: Tensor | Value | None
) -> Iterator[Product]:
    """The products of an equation, an input and a weight, each with the labels of its axes."""
    (X, x_labels), (weight, w_labels) = read, multiplied
    if _ELLIPSIS in x_labels:
        unnamed = _UNNAMED[: X.dim() - len(x_labels) + len(_ELLIPSIS)]
        x_labels, out = x_labels.replace(_ELLIPSIS, unnamed), out.replace(_ELLIPSIS, unnamed)
    # An axis of one entry is repeated for every entry of the input.
    for label in [label for label, size in zip(w_labels, weight.shape, strict=False) if size == 1 and label in out]:
        if label in x_labels:
            weight, w_labels = weight.squeeze(w_labels.index(label)), w_labels.replace(label, "")
    contracted = [label for label in w_labels if label in x_labels and label not in out]
    rows = [label for label in w_labels if label not in contracted]
    tokens = set(x_labels) - set(contracted)
    repeats = any(len(set(labels)) < len(labels) for labels in (x_labels, w_labels, out))
    # A matrix has one input. A sum over outputs or tokens is no layer's output.
    if repeats or len(contracted) != 1 or not tokens.union(rows) <= set(out) or "." in w_labels:
        return
    inputs = x_labels.index(contracted[0]) - len(x_labels)
    if len(rows) == 1 and rows[0] not in x_labels:
        matrix = weight if w_labels[0] == rows[0] else weight.T
        vector = bias is None or bias.dim() == 1
        alone = vector and inputs == -1 and out.endswith(rows[0])
        yield Product("", X, Reading(inputs), matrix, bias if alone else None, alone)
    elif len(rows) == 2:
        yield from _of_experts(X, x_labels, weight, w_labels, rows, inputs)


def _of_experts(
    X: Tensor | Value, x_labels: str, weight: Tensor, w_labels: str, rows: list[str], inputs: int
) -> Iterator[Product]:
    """The products of experts that are multiplied at once: the weight has an axis for them."""
    shared = [label for label in rows if label in x_labels]
    if len(shared) > 1:
        return
    # An input without an axis for experts is read by all of them. They are stored one after the other.
    label = shared[0] if shared else max(rows, key=lambda row: weight.stride(w_labels.index(row)))
    axis = w_labels.index(label)
    own = x_labels.index(label) - len(x_labels) if shared else None
    # An axis with one entry is one, too. A step of 0 in memory repeats an entry.
    if own is not None and X.shape[own] == 1:
        own = None
    repeated = own is not None and X.stride(own) == 0
    (output,) = set(rows) - {label}
    transposed = w_labels.replace(label, "")[0] != output
    for n in range(weight.shape[axis]):
        matrix = weight.select(axis, n)
        yield Product(
            "",
            X,
            Reading(inputs, None if own is None else (own, 0 if repeated else n)),
            matrix.T if transposed else matrix,
            alone=False,
            at_once=True,
        )
