"""Layers of a block: their names, their roles and stages, and the products of a recorded forward that show them.

There is no list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's
own parameters. So transposed layouts are found, and the experts of a mixture: slices of one 3-D parameter, which are
multiplied one at a time or all at once. Every product is read as a product left @ right.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsefw.model.parts import INPUT, Point
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.tape import Calls, Op, Tape, Value, tensors_in
from sparsefw.selection import without_index

# The index of a slice of a parameter.
_SLICE = re.compile(r"\[\d+\]")


@dataclass(frozen=True)
class Layer:
    """One prunable matrix.

    Attributes:
        name: parameter name inside the block; an expert's slice carries its index, "experts.down_proj[3]".
        weight: (out, in) view of the block's own parameter: writing to it changes the block.
        gram: name of the Gram matrix of its input, which is the name of the first layer that reads this input.
        bias: (out,) added to the product, the block's own parameter; None: nothing is.
        at_once: whether it is an expert that is multiplied in one call with the others.
        transposed: whether the columns of the weight are the rows of what is stored.
    """

    name: str
    weight: Tensor
    gram: str
    bias: Tensor | None = None
    at_once: bool = False
    transposed: bool = False


def kind_of(name: str, experts: frozenset[str]) -> str:
    """A layer's name without an expert's index: the same for all experts.

    Args:
        name: the layer's name inside its block.
        experts: names of the modules that may be experts.
    """
    parts = _SLICE.sub("*", name).split(".")
    starts = accumulate(parts, "{}.{}".format)
    return ".".join("*" if start in experts else part for part, start in zip(parts, starts, strict=True))


class ReadsInput(Protocol):
    """A layer, or the shape of one."""

    @property
    def gram(self) -> str:
        """Return the name of the Gram matrix of its input."""


L = TypeVar("L", bound=ReadsInput)


def by_input(layers: Iterable[L], experts: frozenset[str] = frozenset()) -> dict[str, list[L]]:
    """Group layers by the Gram matrix of their input, in the order of use. The layers of a group are a stage.

    Args:
        layers: layers of a block in the order of use.
        experts: as for `kind_of`. The same layers of all experts are one group.
    """
    groups: dict[str, list[L]] = {}
    for layer in layers:
        groups.setdefault(kind_of(layer.gram, experts), []).append(layer)
    return groups


def is_expert(name: str, experts: frozenset[str]) -> bool:
    """Whether a layer belongs to an expert, which sees only some of the tokens. Arguments as for `kind_of`."""
    return kind_of(name, experts) != name


def not_pruned(block: nn.Module, layers: Mapping[str, int]) -> list[str]:
    """Names of the block's matrices that are not among `layers`, such as routers and experts without tokens.

    Args:
        block: the block.
        layers: number of weights by the name of a layer.
    """
    sizes = {without_index(name): size for name, size in layers.items()}
    names = []
    for name, parameter in block.named_parameters():
        slices = slices_of(name, parameter, sizes.get(name))
        if layers.keys().isdisjoint(slices) and parameter.dim() >= 2 and name not in layers:
            names.append(name)
        else:
            names += [expert for expert in slices if expert not in layers]
    return names


def slices_of(name: str, parameter: Tensor, size: int | None = None) -> list[str]:
    """Layer names of the slices of a parameter along its first axis; none where it is not used in slices.

    Args:
        name: name of the parameter.
        parameter: (experts, out, in), or a matrix, which is made of experts one below the other if a layer is smaller.
        size: weights of one of its layers; None if that is not known.
    """
    count = len(parameter) if parameter.dim() == 3 else 1
    if parameter.dim() == 2 and size:
        count = parameter.numel() // size
    return [f"{name}[{expert}]" for expert in range(count)] if count > 1 or parameter.dim() == 3 else []


def layer_of(block: nn.Module, name: str, gram: str, shape: tuple[int, int], transposed: bool) -> Layer:
    """A layer that has been seen elsewhere, in another copy of its block.

    Args:
        block: this copy.
        name, gram: see `Layer`.
        shape: shape of its weight.
        transposed: whether the columns of the weight are the rows of what is stored.
    """
    base = without_index(name)
    matrix: Tensor = block.get_parameter(base)
    if name != base:
        stacked = matrix if matrix.dim() == 3 else matrix.unflatten(0, (matrix.numel() // math.prod(shape), -1))
        matrix = stacked[int(name[len(base) + 1 : -1])]
    return Layer(name, matrix.T if transposed else matrix, gram, transposed=transposed)


@dataclass(frozen=True)
class ResidualWrite:
    """The stream before and behind a layer that writes to it.

    Attributes:
        stream: the stream before it.
        sum: the stream behind it; None: it is the block's output.
    """

    stream: Point
    sum: Point | None


@dataclass(frozen=True)
class Role:
    """A layer's part in its block. It says how the layer's cross matrix is measured, see `measure`.

    The default is that of a layer in a block that has to be run as a whole.

    Attributes:
        segment: number of the cuts before the layer, see `stages`.
        input: the point of its input; None: outputs in both models have to be recorded, since the input is not known,
            or its product goes into other sums than the residual stream.
        write: where it adds its product to the stream, and is measured from the streams of both models. Other layers
            with an input are measured from the inputs.
        keepable: whether the block can go on from the input and the last cut, and saves layers by that.
    """

    segment: int = 0
    input: Point | None = None
    write: ResidualWrite | None = None
    keepable: bool = False


@dataclass(frozen=True)
class Stage:
    """Layers that read one input. They are pruned before the inputs of later layers are measured.

    The same layers of all experts are one stage, too.

    Attributes:
        key: name of their Gram matrix, without an expert's index.
        last: name of the layer that a micro-batch uses last; None for experts, where any may be the last.
        final: whether no stage follows.
        start: the cut that the stage's runs begin at, or the block's input.
        behind: the cut at which the runs of the next stage begin, if it is a later one. The dense model's micro-batches
            move on to it in this stage, and in the final stage to the end of the block.
        input: the point of the layers' input; None: the stage is watched.
        keepable: whether the pruned model's next run can begin at the input.
        layers: the layers, if the stage is not watched. A micro-batch may show others, if they are experts.
        writes: the layers that write to the stream.
    """

    key: str
    last: str | None
    final: bool = False
    start: Point = INPUT
    behind: Point | None = None
    input: Point | None = None
    keepable: bool = False
    layers: tuple[Layer, ...] = field(default=(), compare=False)
    writes: dict[str, ResidualWrite] = field(default_factory=dict, compare=False)


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
_CALLS: dict[Any, tuple[tuple[int, str], ...]] = {nn.functional.linear: ((0, "input"), (1, "weight"), (2, "bias"))}
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
