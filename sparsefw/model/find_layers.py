"""Find the layers of a block: the products of a recorded forward with the block's matrices.

There is no list of layer types. A layer is a parameter of the block, or a slice of a parameter, that the forward
multiplies with an input. So the search also finds layers with a transposed weight, and experts that are slices of one
3-D parameter, whether one call multiplies with a single expert or with all experts.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers import Layer
from sparsefw.model.partial_forward import RunBlock
from sparsefw.model.stubs import hidden_of
from sparsefw.model.tape import Calls, Op, Tape, TapeValue, tensors_in


@dataclass(frozen=True)
class Reading:
    """The part of a tensor that a product reads, and the axis along which it multiplies.

    Attributes:
        inputs: axis of the tensor that is multiplied with the matrix, counted from the end.
        expert: (axis, index) if the product reads only `tensor.select(axis, index)`, with the axis counted from the
            end; None: the product reads the whole tensor.
    """

    inputs: int = -1
    expert: tuple[int, int] | None = None

    def rows(self, X: Tensor) -> Tensor:
        """The inputs that the product reads in X, (tokens, in)."""
        if self.expert is not None:
            # `_matrices` gives the expert an axis before the last two, so `inputs` stays valid.
            X = X.select(*self.expert)
        X = X.movedim(self.inputs, -1)
        return X.reshape(-1, X.shape[-1])


@dataclass(frozen=True)
class Product:
    """A product of an input with a layer's matrix.

    Attributes:
        layer: the layer. `layer.gram` is the layer's own name here; `watch.Watch` sets it.
        X: the tensor that the product reads.
        reading: the part of X that the product reads.
        alone: whether the call multiplies with this matrix only, and the layer's output is the last axis of its result.
    """

    layer: Layer
    X: TapeValue
    reading: Reading
    alone: bool


# Functions that multiply a left operand with a right one. For each function: position and name of the left operand, of
# the right operand, and (if there is one) of the tensor that is added to the product.
_CALLS: dict[Any, tuple[tuple[int, str], ...]] = {nn.functional.linear: ((0, "input"), (1, "weight"), (2, "bias"))}
_CALLS |= dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ((0, "input"), (1, "other")))
_CALLS |= dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ((0, "input"), (1, "mat2")))
_CALLS |= dict.fromkeys((torch.addmm, Tensor.addmm), ((1, "mat1"), (2, "mat2"), (0, "input")))
_CALLS |= dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ((1, "batch1"), (2, "batch2"), (0, "input")))

# Names of functions whose output entries each combine several entries of the inputs, such as products.
MIXING = {function.__name__ for function in _CALLS}
MIXING |= {"einsum", "tensordot", "bilinear", "outer", "conv1d", "conv2d", "embedding", "scaled_dot_product_attention"}


class WeightNames:
    """Finds the name of a block's matrix, or of a slice of one, by the address of a tensor."""

    def __init__(self, block: nn.Module) -> None:
        self._by_storage: dict[int, list[tuple[Tensor, str]]] = {}
        for name, parameter in block.named_parameters():
            if parameter.dim() in (2, 3):
                self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((parameter, name))
        # Address 0 stands for tensors without data.
        self._by_storage.pop(0, None)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of one of the block's matrices."""
        return tensor.untyped_storage().data_ptr() in self._by_storage

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tape has to hold a tensor: a weight, or any vector, which may be a computed bias."""
        return tensor.dim() < 2 or self.is_weight(tensor)

    def locate(self, matrix: Tensor) -> tuple[str | None, bool]:
        """Find the name of a matrix, and whether the matrix is the transpose of the stored parameter or slice.

        The name is None if the matrix is neither a parameter of the block nor a slice of one.
        """
        axes = _axes(matrix)
        for parameter, name in self._by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            for index, stored in _stored_at(matrix, parameter):
                if sorted(axes) == sorted(_axes(stored)):
                    return f"{name}{index}", matrix.shape != stored.shape or axes != _axes(stored)
        return None, False


def _stored_at(matrix: Tensor, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameter, and the slice of it, that begin at the same address as a matrix.

    Each comes with its index as text: "" for the parameter, or "[3]" for a slice. A 2-D parameter counts as a stack of
    slices with as many weights as the matrix.
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
    """List the stride and size of each axis of a matrix, without axes of size 1."""
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
    # A call that scales its result is no layer, and neither is a product of two weights.
    if sum(weights) != 1 or {"alpha", "beta"} & kwargs.keys():
        return []
    left = weights[0]
    X, weight = operands[left], operands[not left].tensor
    linear = op.function is nn.functional.linear
    if not X.shape or weight.dim() < 2 or (linear and left):
        return []
    matrices = weight if left or linear else weight.mT
    # If the weight is the left operand, it multiplies the columns of X.
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
    """Yield each matrix (out, in) of a product, the part of X that it reads, and whether the call has several matrices.

    Args:
        X: the tensor that is multiplied with the matrices.
        matrices: (..., out, in). One of the first axes may be an axis of experts; the rest of them have size 1.
        inputs: the axis of X that is multiplied, counted from the end.
    """
    axes = [axis for axis in range(-matrices.dim(), -2) if matrices.shape[axis] > 1]
    if not axes:
        yield matrices.flatten(0, -2), Reading(inputs), False
    if len(axes) != 1:
        return
    # If X has no axis of experts, all experts read the same input. With a stride of 0 along this axis they do, too.
    (axis,) = axes
    own = len(X.shape) >= -axis and X.shape[axis] > 1
    repeated = own and X.strides[axis] == 0
    for n in range(matrices.shape[axis]):
        reading = Reading(inputs, (axis, 0 if repeated else n) if own else None)
        yield matrices.select(axis, n).flatten(0, -2), reading, True


# A call of a module: name of the module, the first tensor among its arguments, and the tensors that it returns.
ModuleCall = tuple[str, tuple[TapeValue, ...], tuple[TapeValue, ...]]


@dataclass(frozen=True)
class BlockTape:
    """A recorded forward of a block.

    Attributes:
        ops: the operations.
        products: products with matrices of the block, by the number of their operation.
        hidden: the block's input.
        output: the hidden states that the block returns.
        handed_on: the other tensors that later blocks read after this block.
        names: finds the names of the block's matrices.
        modules: the calls of modules.
    """

    ops: list[Op]
    products: dict[int, list[Product]]
    hidden: TapeValue
    output: TapeValue
    handed_on: list[TapeValue]
    names: WeightNames
    modules: list[ModuleCall]


def record_block(
    block: nn.Module,
    run: RunBlock,
    hidden: Tensor,
    handed_on: Callable[[Any], Any] = lambda returned: (),
    modules: Collection[str] = (),
) -> tuple[BlockTape, Tensor]:
    """Record a forward of a block; also returns the hidden states that the block returns.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through the block: called with the block's input, returns the block's output.
        hidden: one micro-batch.
        handed_on: called with the block's output; returns the tensors other than hidden states that later blocks read.
        modules: names of the modules whose calls are recorded.
    """
    names = WeightNames(block)
    tape = Tape((hidden,), names.holds)
    calls: list[ModuleCall] = []

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        with tape.pause():
            # Only the first argument counts: others may be accumulators that are passed from module to module.
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
    products = {op.number: products_of(op, names) for op in tape.ops}
    return BlockTape(tape.ops, products, given, made, others, names, calls), output
