"""Layers of a block, their names, their roles in the block, and the stages in which they are pruned."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor, nn

from sparsefw.model.parts import INPUT, Point
from sparsefw.solver.patterns import without_index

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
class Write:
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
    write: Write | None = None
    keepable: bool = False


def is_watched(roles: Sequence[Role]) -> bool:
    """Whether a stage has to be watched: the point of its input, or of an output, is not known."""
    return any(role.input is None for role in roles)


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
    writes: dict[str, Write] = field(default_factory=dict, compare=False)
