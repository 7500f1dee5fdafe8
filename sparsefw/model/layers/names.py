"""Layers and their names: which matrix of a block a weight is, and which matrices are not layers."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn

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
        for parameter, name in self._by_storage.get(matrix.untyped_storage().data_ptr(), ()):
            offset, layout = int(matrix.storage_offset()) - int(parameter.storage_offset()), _layout(matrix)
            if parameter.dim() == 2 and not offset and layout == _layout(parameter):
                return name, _is_transposed(matrix, parameter)
            stacked = parameter
            if parameter.dim() == 2 and parameter.is_contiguous() and matrix.numel() > 0:
                # Slices of some rows each.
                count = parameter.numel() // matrix.numel()
                if count > 1 and not len(parameter) % count:
                    stacked = parameter.unflatten(0, (count, -1))
            if stacked.dim() == 3:
                index, rest = divmod(offset, stacked.stride(0))
                if not rest and 0 <= index < len(stacked) and layout == _layout(stacked[index]):
                    return f"{name}[{index}]", _is_transposed(matrix, stacked[index])
        return None, False


def _layout(matrix: Tensor) -> list[tuple[int, int]]:
    """Steps in memory and sizes of the axes, whatever their order."""
    return sorted(_axes(matrix))


def _is_transposed(matrix: Tensor, stored: Tensor) -> bool:
    """Whether a view of what is stored has its axes in the other order."""
    return matrix.shape != stored.shape or _axes(matrix) != _axes(stored)


def _axes(matrix: Tensor) -> list[tuple[int, int]]:
    return [(step, size) for step, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1]
