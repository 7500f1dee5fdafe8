"""Layers of a block: their names, their roles, and the stages in which they are pruned."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol, TypeVar

from torch import Tensor, nn

from sparsefw.model.partial_forward import INPUT, Point
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
        bias: (out,) the block's own parameter that is added to the product; None: there is no bias.
        at_once: whether it is an expert that is multiplied in one call with the others.
        transposed: whether the columns of the weight are the rows of the stored parameter.
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
    """List the block's matrices that are not among `layers`, such as routers and experts without tokens.

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
    """List the layer names of a parameter's slices along its first axis; empty if it is not used in slices.

    Args:
        name: name of the parameter.
        parameter: (experts, out, in); or a matrix, which consists of experts one below the other if a layer is smaller.
        size: number of weights of one of its layers; None: not known.
    """
    count = len(parameter) if parameter.dim() == 3 else 1
    if parameter.dim() == 2 and size:
        count = parameter.numel() // size
    return [f"{name}[{expert}]" for expert in range(count)] if count > 1 or parameter.dim() == 3 else []


def layer_of(block: nn.Module, name: str, gram: str, shape: tuple[int, int], transposed: bool) -> Layer:
    """Find a layer that was seen in another copy of its block.

    Args:
        block: this copy.
        name, gram: see `Layer`.
        shape: shape of its weight.
        transposed: whether the columns of the weight are the rows of the stored parameter.
    """
    base = without_index(name)
    matrix: Tensor = block.get_parameter(base)
    if name != base:
        stacked = matrix if matrix.dim() == 3 else matrix.unflatten(0, (matrix.numel() // math.prod(shape), -1))
        matrix = stacked[int(name[len(base) + 1 : -1])]
    return Layer(name, matrix.T if transposed else matrix, gram, transposed=transposed)


@dataclass(frozen=True)
class ResidualWrite:
    """The residual stream before and after a layer that adds its product to it.

    Attributes:
        stream: the stream before the layer.
        sum: the stream after it; None: this is the block's output.
    """

    stream: Point
    sum: Point | None


@dataclass(frozen=True)
class Role:
    """A layer's role in its block, by which its cross matrix is measured, see `measure`.

    The default is the role of a layer in a block that has to be run as a whole.

    Attributes:
        segment: number of the cuts before the layer, see `stages`.
        input: the point of its input; None: outputs in both models have to be recorded, since the input is not known,
            or the product goes into other sums than the residual stream.
        write: where it adds its product to the stream. Such a layer is measured from the streams of both models, and
            another one with an input from the inputs in both models.
        cacheable: whether the block can go on from the input and the last cut, and saves layers by that.
    """

    segment: int = 0
    input: Point | None = None
    write: ResidualWrite | None = None
    cacheable: bool = False


@dataclass(frozen=True)
class Stage:
    """Layers that read one input. They are pruned before the inputs of later layers are measured.

    The same layers of all experts are one stage, too.

    Attributes:
        key: name of their Gram matrix, without an expert's index.
        last: name of the layer that a micro-batch uses last; None for experts, where any may be the last.
        final: whether no stage follows.
        start: the point at which the stage's runs begin: a cut, or the block's input.
        next_start: the cut at which the runs of the next stage begin, if it is a later one. The dense model's
            micro-batches move on to it in this stage, and in the final stage to the end of the block.
        input: the point of the layers' input; None: the layers are watched.
        cacheable: whether the pruned model's next run can begin at the input.
        layers: the layers, if they are not watched. A micro-batch may show others, if they are experts.
        writes: the layers that write to the residual stream.
    """

    key: str
    last: str | None
    final: bool = False
    start: Point = INPUT
    next_start: Point | None = None
    input: Point | None = None
    cacheable: bool = False
    layers: tuple[Layer, ...] = field(default=(), compare=False)
    writes: dict[str, ResidualWrite] = field(default_factory=dict, compare=False)
