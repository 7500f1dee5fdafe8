"""Layers of a block: their names, their roles, and the stages in which they are pruned."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsefw.model.partial_forward import INPUT, Point
from sparsefw.selection import INDEX, without_index

# Dtypes of quantized weights: single bytes, or integers that pack several weights.
QUANTIZED = {getattr(torch, name) for name in dir(torch) if re.match(r"u?int(8|16|32)$|float8", name)}


@dataclass(frozen=True)
class Layer:
    """One prunable matrix.

    Attributes:
        name: name of the parameter inside the block, for a slice with its index: "experts.down_proj[3]".
        weight: (out, in) view of the block's own parameter. Writing to the view changes the block.
        gram: name of the Gram matrix of the layer's input: the name of the first layer that reads this input.
        bias: (out,) the tensor that the block adds to the product; None: there is no bias.
        at_once: whether the layer is an expert, and one call multiplies with all experts.
        transposed: whether `weight` is the transpose of the stored parameter or slice.
    """

    name: str
    weight: Tensor
    gram: str
    bias: Tensor | None = None
    at_once: bool = False
    transposed: bool = False


# Names of the modules in a block that may be experts.
Experts = frozenset[str]


def kind_of(name: str, experts: Experts) -> str:
    """A layer's name with "*" for an expert's index, so that it is the same for all experts.

    Args:
        name: the layer's name inside its block.
        experts: names of the modules that may be experts.
    """
    parts = INDEX.sub("*", name).split(".")
    starts = accumulate(parts, "{}.{}".format)
    return ".".join("*" if start in experts else part for part, start in zip(parts, starts, strict=True))


class ReadsInput(Protocol):
    """A layer or a `LayerShape`: an object with the name of a Gram matrix."""

    @property
    def gram(self) -> str:
        """Return the name of the Gram matrix of the layer's input."""


L = TypeVar("L", bound=ReadsInput)


def by_input(layers: Iterable[L], experts: Experts = frozenset()) -> dict[str, list[L]]:
    """Group layers by the Gram matrix of their input, in the order of use. The layers of a group are a stage.

    Args:
        layers: layers of a block in the order of use.
        experts: as for `kind_of`. The same layers of all experts are one group.
    """
    groups: dict[str, list[L]] = {}
    for layer in layers:
        groups.setdefault(kind_of(layer.gram, experts), []).append(layer)
    return groups


def is_expert(name: str, experts: Experts) -> bool:
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
    return list(dict.fromkeys([*names, *quantized(block)]))


def quantized(block: nn.Module) -> list[str]:
    """List the block's matrices of bytes or of packed integers, parameters or buffers. They are not pruned."""
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    return [name for name, x in tensors if x.dim() >= 2 and x.dtype in QUANTIZED]


def slices_of(name: str, parameter: Tensor, size: int | None) -> list[str]:
    """List the layer names of a parameter's slices along its first axis; empty if the parameter is a single layer.

    Args:
        name: name of the parameter.
        parameter: (experts, out, in); or a matrix, which may be the experts' matrices stacked by rows.
        size: number of weights of one of the parameter's layers; None if unknown, and then a matrix is not cut.
    """
    count = len(parameter) if parameter.dim() == 3 else 1
    if parameter.dim() == 2 and size:
        count = parameter.numel() // size
    return [f"{name}[{expert}]" for expert in range(count)] if count > 1 or parameter.dim() == 3 else []


def layer_of(block: nn.Module, name: str, gram: str, shape: Iterable[int], transposed: bool) -> Layer:
    """Find a layer in a block by what is known of it from another copy of the block.

    Args:
        block: the block.
        name, gram, transposed: attributes of the layer, see `Layer`.
        shape: shape of the layer's weight.
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
        stream: the point of the stream before the layer.
        sum: the point of the stream after the layer; None: the block's output.
    """

    stream: Point
    sum: Point | None


@dataclass(frozen=True)
class Role:
    """A layer's role in its block. It decides how the layer's cross matrix is measured, see `measure`.

    - With `write`, it is measured from the residual streams of both models.
    - With `input` only, it is measured from the layer's inputs in both models.
    - With neither, it is measured from the layer's outputs in both models. All layers of a block that has to run as a
      whole have this role, the default.

    Attributes:
        segment: number of the cuts before the layer, see `stages`.
        input: the point of the layer's input; None if it is unknown, or if the product is added to another sum than the
            residual stream.
        write: the residual stream before and after the layer; None if the layer does not add its product to it.
        cacheable: whether the block can resume from `input` and the last cut, and this skips at least one layer.
    """

    segment: int = 0
    input: Point | None = None
    write: ResidualWrite | None = None
    cacheable: bool = False


@dataclass(frozen=True)
class Stage:
    """Layers that read one input. They are pruned before the inputs of later layers are measured.

    The corresponding layers of all experts are one stage, though each expert has its own input.

    Attributes:
        key: name of the layers' Gram matrix, without an expert's index, see `kind_of`.
        last: name of the layer that a forward uses last; None for experts, whose order depends on the micro-batch.
        final: whether this is the last stage of the block.
        start: the point at which the stage's runs begin: a cut, or the block's input.
        next_start: the start of the next stage if it is later than `start`, else None. In this stage the dense model's
            micro-batches move to this point. In the final stage they move to the end of the block.
        input: the point of the layers' input; None if it is unknown. Then a `Watch` finds the layers in each forward.
        cacheable: whether the pruned model's next run can begin at `input`.
        layers: the layers; empty if `input` is None.
        writes: the layers among them that add their product to the residual stream, by name.
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
