"""Outputs of layers. The output of a layer that writes to the residual stream is the sum with the stream."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers.names import is_expert
from sparsefw.model.layers.products import Product
from sparsefw.model.tape import Value

# Functions that add a layer's output to something else.
ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__iadd__,
    torch.Tensor.__radd__,
}

# Functions that pass a layer's output on unchanged, or added to something else.
PASS_ON = ADDITIONS | {
    torch.reshape,
    torch.Tensor.reshape,
    torch.Tensor.view,
    nn.functional.dropout,
}


@dataclass(frozen=True)
class Sum:
    """A sum that a layer's output went into.

    Attributes:
        other: what it was added to.
        out: the sum.
    """

    other: Any
    out: Any


class Outputs:
    """Inputs and outputs of layers in one micro-batch: tensors in a forward, values of one that was recorded.

    A layer's output is its product, or the sum that the product is added to. Once a sum is read by something that does
    not just pass it on, such as a norm, it is not followed into later sums: they depend on the layer's output by
    another way, too, and are not the layer's to repair. Outputs of experts are not recorded: an expert sees other
    tokens in the dense model.

    Args:
        experts: names of modules that may be experts.
    """

    def __init__(self, experts: frozenset[str]) -> None:
        self._experts = experts
        # By layer: the tensor, and how often it had been written to when it was recorded.
        self._inputs: dict[str, tuple[Any, int]] = {}
        self._outputs: dict[str, tuple[Any, int]] = {}
        # The layers whose output a tensor is, by the tensor's id. The tensor is held, so that no other one takes its
        # id.
        self._layers_of: dict[int, tuple[Any, tuple[str, ...]]] = {}
        # Ids of those tensors that are not followed any more.
        self._read: set[int] = set()
        # By layer: the sums that its output went into.
        self.sums: dict[str, list[Sum]] = {}

    def add(self, products: Sequence[Product], operands: Sequence[Any], out: Any) -> None:
        """Record what products read, and what the call that makes them returns.

        Args:
            products: the products with layers.
            operands: the tensors among the call's arguments.
            out: what it returned.
        """
        self._note_read(operands, out)
        alone = [product for product in products if product.alone]
        for product in alone:
            self._inputs[product.layer] = (product.X, product.X._version)
        if alone:
            self._add_output([product.layer for product in alone], out)

    def _add_output(self, layers: Iterable[str], out: Any) -> None:
        """Record a tensor as the output of layers, in addition to those whose output it is already."""
        layers = [layer for layer in layers if not is_expert(layer, self._experts)]
        _, others = self._layers_of.get(id(out), (out, ()))
        self._layers_of[id(out)] = (out, tuple(dict.fromkeys((*others, *layers))))
        for layer in layers:
            self._outputs[layer] = (out, out._version)

    def follow(self, function: Any, args: tuple, kwargs: dict, operands: Sequence[Any], out: Any) -> None:
        """Record the result of a function as an output, if the function passed outputs on or added them up.

        Args:
            function, args, kwargs, out: the call, and what it returned.
            operands: the tensors among its arguments.
        """
        # alpha scales one of the summands.
        if function not in PASS_ON or "alpha" in kwargs:
            self._note_read(operands, out)
            return
        followed = [id(x) for x in args[:2] if id(x) in self._layers_of and id(x) not in self._read]
        for operand, layers in [self._layers_of[key] for key in followed]:
            if out.numel() == operand.numel() and out.shape[-1] == operand.shape[-1]:
                self._add_output(layers, out)
                if function in ADDITIONS:
                    other = args[1] if operand is args[0] else args[0]
                    for layer in layers:
                        self.sums.setdefault(layer, []).append(Sum(other, out))

    def _note_read(self, operands: Sequence[Any], out: Any) -> None:
        """Stop following the tensors that a function made another tensor of."""
        # Shapes, dtypes and the like are no tensors, and `to` may give back the tensor itself.
        if isinstance(out, Tensor | Value | tuple) and not isinstance(out, torch.Size):
            self._read.update(id(x) for x in operands if id(x) in self._layers_of and x is not out)

    def output_of(self, layer: str) -> Tensor | None:
        """A layer's output, (tokens, out); None if there is none, or if it has been written to."""
        return _as_matrix(self._outputs[layer]) if layer in self._outputs else None

    def is_output(self, tensor: Any, layer: str) -> bool:
        """Whether a tensor is the output of a layer, the object itself."""
        return layer in self._outputs and self._outputs[layer][0] is tensor

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, input (tokens, in) and output (tokens, out) of each layer that has both."""
        for layer in self._outputs:
            x, out = _as_matrix(self._inputs[layer]), self.output_of(layer)
            if x is not None and out is not None:
                yield layer, x, out


def _as_matrix(recorded: tuple[Tensor, int]) -> Tensor | None:
    """The tensor as a matrix; None if it has been written to since it was recorded."""
    tensor, version = recorded
    return tensor.reshape(-1, tensor.shape[-1]) if tensor._version == version else None
