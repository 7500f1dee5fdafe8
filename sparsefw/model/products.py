"""One micro-batch's forward through a block, recorded, with its products of an input and a matrix of the block.

There is no list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's
own parameters. So transposed layouts are found, and the experts of a mixture: slices of one 3-D parameter, which are
multiplied one at a time or all at once. Every product is read as a product left @ right.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers import Layer
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.tape import Calls, Op, Tape, Value, tensors_in


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
        layer: the layer, as if it were the first one to read this input.
        X: the tensor that is read.
        reading: how it is read.
        alone: whether the call multiplies with nothing else, and the last axis of its output is the matrix's output.
    """

    layer: Layer
    X: Any
    reading: Reading
    alone: bool


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


class WeightNames:
    """Finds the name of a weight by its memory: it is one of the block's parameters, or a slice of a stacked one."""

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

    def locate(self, matrix: Tensor) -> tuple[str | None, bool]:
        """The name of a matrix, and whether it is the transpose of what is stored.

        None if it is not the block's, or a part that is no slice of one of its matrices.
        """
        axes = _axes(matrix)
        for parameter, name in self._by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            for index, stored in _stored_at(matrix, parameter):
                if sorted(axes) == sorted(_axes(stored)):
                    return f"{name}{index}", matrix.shape != stored.shape or axes != _axes(stored)
        return None, False


def _stored_at(matrix: Tensor, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What begins in a parameter where a matrix does, as it is stored: the parameter, or a slice of it, with its index.

    A parameter with two axes may be made of slices of some rows each.
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
    """Steps in memory and sizes of the axes."""
    return [(step, size) for step, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1]


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
    found = []
    for matrix, reading, at_once in _matrices(X, matrices, inputs):
        name, transposed = names.locate(matrix)
        if name:
            one = alone and not at_once
            bias = tensors[2] if one and added is not None else None
            found.append(Product(Layer(name, matrix, name, bias, at_once, transposed), X, reading, one))
    return found


def _matrices(X: Tensor | Value, matrices: Tensor, inputs: int) -> Iterator[tuple[Tensor, Reading, bool]]:
    """Each of the matrices (out, in) that a tensor is multiplied with, how it is read, and whether there are others.

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
    # An input without an axis for experts is read by all of them. A step of 0 in memory repeats an entry.
    (axis,) = axes
    own = X.dim() >= -axis and X.shape[axis] > 1
    repeated = own and X.stride(axis) == 0
    for n in range(matrices.shape[axis]):
        reading = Reading(inputs, (axis, 0 if repeated else n) if own else None)
        yield matrices.select(axis, n).flatten(0, -2), reading, True


@dataclass(frozen=True)
class BlockTape:
    """A recorded forward of a block.

    Attributes:
        ops: the operations.
        products: by the number of an operation, its products with matrices of the block.
        hidden: the block's input.
        output: the hidden states that it returns.
        handed_on: other tensors of it that later blocks are given.
        names: the block's matrices.
        modules: calls of modules: the name, the first tensor that it was given, and those that it has returned.
    """

    ops: list[Op]
    products: dict[int, list[Product]]
    hidden: Value
    output: Value
    handed_on: list[Value]
    names: WeightNames
    modules: list[tuple[str, tuple[Value, ...], tuple[Value, ...]]]


def record_block(
    block: nn.Module,
    run: Callable[[Tensor], Any],
    hidden: Tensor,
    handed_on: Callable[[Any], Any] = lambda returned: (),
    modules: Collection[str] = (),
) -> tuple[BlockTape, Tensor]:
    """Record a forward of a block; also the hidden states that it returns.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it: called with the block's input, returns what the block does.
        hidden: one micro-batch.
        handed_on: called with what the block has returned; the tensors that later blocks are given beside the hidden
            states.
        modules: names of the modules whose calls are wanted.
    """
    names = WeightNames(block)
    # Biases, too: they may be computed.
    tape = Tape((hidden,), lambda x: x.dim() < 2 or names.is_weight(x))
    calls: list[tuple[str, tuple[Value, ...], tuple[Value, ...]]] = []

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        with tape.pause():
            # Other tensors that it is given may be sums that go from module to module.
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
    products = {op.number: found for op in tape.ops if (found := products_of(op.function, op.args, op.kwargs, names))}
    return BlockTape(tape.ops, products, given, made, others, names, calls), output
