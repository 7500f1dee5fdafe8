"""Layers and their names: which matrix of a block a weight is, and which matrices are not layers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

# Matrices that choose experts, and convolutions, stay dense: they are small, and much depends on them.
KEPT_DENSE = re.compile(r"(^|\.)(router|gate|shared_expert_gate)\.weight$|conv1d")

# The part of a layer's name that tells experts apart: the index of a slice, or of a module in a list.
_EXPERT_INDEX = re.compile(r"\[\d+\]|(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Layer:
    """One prunable matrix.

    Attributes:
        name: parameter name inside the block; an expert's slice carries its index, "experts.down_proj[3]".
        weight: (out, in) view of the block's own parameter: writing to it changes the block.
        gram: name of the Gram matrix of its input, which is the name of the first layer that reads this input.
        bias: (out,) added to the product, the block's own parameter; None: nothing is.
    """

    name: str
    weight: Tensor
    gram: str
    bias: Tensor | None = None


def kind_of(name: str) -> str:
    """A layer's name without an expert's index: the same for all experts."""
    return _EXPERT_INDEX.sub("*", name)


def is_expert(name: str) -> bool:
    """Whether a layer belongs to an expert, which sees only some of the tokens."""
    return kind_of(name) != name


def not_pruned(block: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the block's matrices that are not among `layers`, such as routers and experts without tokens."""
    layers, names = set(layers), []
    for name, parameter in block.named_parameters():
        slices = slices_of(name, parameter)
        if layers.isdisjoint(slices) and parameter.dim() >= 2 and name not in layers:
            names.append(name)
        else:
            names += [expert for expert in slices if expert not in layers]
    return names


def slices_of(name: str, parameter: Tensor) -> list[str]:
    """Layer names of the slices of a stacked parameter, (experts, out, in); none where it is not stacked."""
    return [f"{name}[{expert}]" for expert in range(len(parameter))] if parameter.dim() == 3 else []


class WeightNames:
    """Finds the name of a weight by its memory: it is one of the block's parameters, or a slice of a stacked one."""

    def __init__(self, block: nn.Module) -> None:
        self._parameters = [
            (p.untyped_storage().data_ptr(), p.storage_offset(), p, name) for name, p in block.named_parameters()
        ]

    def find(self, weight: Tensor) -> str | None:
        """The name of a matrix; None if it is not the block's, or only a part of one of its matrices."""
        storage, offset = weight.untyped_storage().data_ptr(), weight.storage_offset()
        for data, start, parameter, name in self._parameters:
            if data == storage and start <= offset < start + parameter.numel():
                matrix = parameter if parameter.dim() == 2 else parameter[0]
                if weight.numel() != matrix.numel():
                    # Only a part of the matrix is used here: it is no layer, and is reported as kept dense.
                    return None
                return name if parameter.dim() == 2 else f"{name}[{(offset - start) // parameter.stride(0)}]"
        return None
