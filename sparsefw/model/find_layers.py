"""Products of a recorded forward with the matrices of a block. They show which matrices are layers.

There is no list of layer types. A layer is a matrix, or a slice of one, among the block's own parameters that the
forward multiplies with an input. So layers with a transposed weight are found, and the experts of a mixture, which are
slices of one 3-D parameter and are multiplied one at a time or all at once.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers import Layer
from sparsefw.model.stubs import hidden_of
from sparsefw.model.tape import Calls, Op, Tape, TapeValue, tensors_in


@dataclass(frozen=True)
class Reading:
    """The way in which a product reads a tensor.

    Attributes:
        inputs: axis of the matrix's inputs, counted from the end.
        expert: axis, counted from the end, and index of the part that is read; None: the product reads all of it.
    """

    inputs: int = -1
    expert: tuple[int, int] | None = None

    def rows(self, X: Tensor) -> Tensor:
        """The inputs in a tensor, (tokens, in)."""
        if self.expert is not None:
            # The expert's axis is before the last two.
            X = X.select(*self.expert)
        X = X.movedim(self.inputs, -1)
        return X.reshape(-1, X.shape[-1])


@dataclass(frozen=True)
class Product:
    """A product of an input with a layer's matrix.

    Attributes:
        layer: the layer. Its Gram matrix is named as if it were the first layer to read this input.
        X: the tensor that is read.
        reading: how it is read.
        alone: whether the call multiplies with no other matrix, and the last axis of its output is the layer's output.
    """

    layer: Layer
    X: TapeValue
    reading: Reading
    alone: bool


# Functions that multiply a left operand with a right one. For each: the positions and names of both among its
# arguments, and of the tensor that is added to the product.
_CALLS: dict[Any, tuple[tuple[int, str], ...]] = {nn.functional.linear: ((0, "input"), (1, "weight"), (2, "bias"))}
_CALLS |= dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ((0, "input"), (1, "other")))
_CALLS |= dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ((0, "input"), (1, "mat2")))
_CALLS |= dict.fromkeys((torch.addmm, Tensor.addmm), ((1, "mat1"), (2, "mat2"), (0, "input")))
_CALLS |= dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ((1, "batch1"), (2, "batch2"), (0, "input")))

# Names of all functions that multiply tensors. Each entry of their output combines several entries of the input.
MIXING = {function.__name__ for function in _CALLS}
MIXING |= {"einsum", "tensordot", "bilinear", "outer", "conv1d", "conv2d", "embedding", "scaled_dot_product_attention"}


class WeightNames:
    """The names of a block's matrices and of their slices, found by the memory in which a tensor lies."""

    def __init__(self, block: nn.Module) -> None:
        self._by_storage: dict[int, list[tuple[Tensor, str]]] = {}
        for name, parameter in block.named_parameters():
            if parameter.dim() in (2, 3):
                self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((parameter, name))
        # Tensors without data have no address.
        self._by_storage.pop(0, None)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of one of the block's matrices."""
        return tensor.untyped_storage().data_ptr() in self._by_storage

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tape has to hold a tensor: a weight, or a bias, which may be computed."""
        return tensor.dim() < 2 or self.is_weight(tensor)

    def locate(self, matrix: Tensor) -> tuple[str | None, bool]:
        """Find the name of a matrix, and whether it is the transpose of what is stored.

        The name is None for a matrix of others, and for a part of a parameter that is no slice of it.
        """
        axes = _axes(matrix)
        for parameter, name in self._by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            for index, stored in _stored_at(matrix, parameter):
                if sorted(axes) == sorted(_axes(stored)):
                    return f"{name}{index}", matrix.shape != stored.shape or axes != _axes(stored)
        return None, False


def _stored_at(matrix: Tensor, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what begins in a parameter where a matrix begins: the parameter, or one of its slices with the index.

    A parameter with two axes may consist of slices of some rows each.
    """
    offset = int(matrix.storage_offset()) - int(parameter.storage_offset())
    if parameter.dim() == 2:
        if not offset:
            yield "", parameter
        count = parameter.numel() // max(1, matrix.numel())
        if not parameter.is_contiguous() or count < 2 or len(parameter) % count:
            return
        parameter = parameter.unflatten(0, (count, -1))
    index, rest = divmod(offset, parameter.stride(0))
    if not rest and 0 <= index < len(parameter):
        yield f"[{index}]", parameter[index]


def _axes(matrix: Tensor) -> list[tuple[int, int]]:
    """List the steps in memory and the sizes of a matrix's axes."""
    return [(step, size) for step, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1]


def products_of(op: Op, names: WeightNames) -> list[Product]:
    """List the products of an operation with matrices of a block.

    Args:
        op: the operation, on a tape that holds weights and biases.
        names: the block's matrices.
    """
    if op.function not in _CALLS:
        return []
    args, kwargs = op.args, op.kwargs
    operands: list[Any] = [args[at] if len(args) > at else kwargs.get(name) for at, name in _CALLS[op.function]]
    if not all(isinstance(x, TapeValue) for x in operands[:2]):
        return []
    weights = [x.tensor is not None and names.is_weight(x.tensor) for x in operands[:2]]
    # The output of a layer is not scaled, and a product of two weights has no input.
    if sum(weights) != 1 or {"alpha", "beta"} & kwargs.keys():
        return []
    left = weights[0]
    X, weight = operands[left], operands[not left].tensor
    linear = op.function is nn.functional.linear
    if not X.shape or weight.dim() < 2 or (linear and left):
        return []
    matrices = weight if left or linear else weight.mT
    # A matrix on the left multiplies columns.
    inputs = -2 if left and len(X.shape) > 1 else -1
    added = operands[2] if len(operands) > 2 else None
    alone = inputs == -1 and (added is None or len(added.shape) == 1)
    found = []
    for matrix, reading, at_once in _matrices(X, matrices, inputs):
        name, transposed = names.locate(matrix)
        if name:
            one = alone and not at_once
            bias = added.tensor if one and added is not None else None
            found.append(Product(Layer(name, matrix, name, bias, at_once, transposed), X, reading, one))
    return found


def _matrices(X: TapeValue, matrices: Tensor, inputs: int) -> Iterator[tuple[Tensor, Reading, bool]]:
    """Yield each matrix (out, in) that multiplies a tensor, how it reads the tensor, and whether there are others.

    Args:
        X: the tensor.
        matrices: (..., out, in), with an axis for experts where there are several.
        inputs: the axis of the tensor that is multiplied.
    """
    axes = [axis for axis in range(-matrices.dim(), -2) if matrices.shape[axis] > 1]
    if not axes:
        yield matrices.flatten(0, -2), Reading(inputs), False
    if len(axes) != 1:
        return
    # All experts read an input without an axis for them. A step of 0 in memory repeats an entry.
    (axis,) = axes
    own = len(X.shape) >= -axis and X.shape[axis] > 1
    repeated = own and X.strides[axis] == 0
    for n in range(matrices.shape[axis]):
        reading = Reading(inputs, (axis, 0 if repeated else n) if own else None)
        yield matrices.select(axis, n).flatten(0, -2), reading, True


@dataclass(frozen=True)
class BlockTape:
    """A recorded forward of a block.

    Attributes:
        ops: the operations.
        products: products with matrices of the block, by the number of their operation.
        hidden: the block's input.
        output: the hidden states that it returns.
        handed_on: other tensors of the block that later blocks are given.
        names: the block's matrices.
        modules: calls of modules: the name, the first tensor among the arguments, and the tensors that it returns.
    """

    ops: list[Op]
    products: dict[int, list[Product]]
    hidden: TapeValue
    output: TapeValue
    handed_on: list[TapeValue]
    names: WeightNames
    modules: list[tuple[str, tuple[TapeValue, ...], tuple[TapeValue, ...]]]


def record_block(
    block: nn.Module,
    run: Callable[[Tensor], Any],
    hidden: Tensor,
    handed_on: Callable[[Any], Any] = lambda returned: (),
    modules: Collection[str] = (),
) -> tuple[BlockTape, Tensor]:
    """Record a forward of a block; also returns the hidden states that the block returns.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through the block: called with the block's input, returns the block's output.
        hidden: one micro-batch.
        handed_on: called with the block's output; returns the tensors that later blocks are given besides the hidden
            states.
        modules: names of the modules whose calls are wanted.
    """
    names = WeightNames(block)
    tape = Tape((hidden,), names.holds)
    calls: list[tuple[str, tuple[TapeValue, ...], tuple[TapeValue, ...]]] = []

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        with tape.pause():
            # Its other arguments may be sums that go from module to module.
            read, returned = (tuple(map(tape.value, tensors_in(x))) for x in ((args, kwargs), out))
            calls.append((name, read[:1], returned))

    with torch.no_grad(), ExitStack() as hooks:
        for name in modules:
            hook = block.get_submodule(name).register_forward_hook(partial(note, name), with_kwargs=True)
            hooks.callback(hook.remove)
        with Calls(tape.record):
            returned = run(hidden)
    output = hidden_of(returned)
    given, made, *others = map(tape.value, tensors_in((hidden, output, handed_on(returned))))
    products = {op.number: found for op in tape.ops if (found := products_of(op, names))}
    return BlockTape(tape.ops, products, given, made, others, names, calls), output
