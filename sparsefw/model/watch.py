"""See the layers of a block when they are used, with their inputs and, where wanted, their outputs."""

import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsefw.errors import InputError
from sparsefw.model.layers import Layer, Product, Reading, Stage, WeightNames, is_expert, kind_of, products_of
from sparsefw.model.parts import ForwardIsOver
from sparsefw.model.recording import without_padding
from sparsefw.model.tape import Calls, Value, name_of, tensors_in

# Called with the name of a layer inside its block, such as "mlp.down_proj.weight" or "mlp.experts.down_proj[3]".
Selector = Callable[[str], bool]

Result = TypeVar("Result")

# Functions that add a layer's output to something else, by name.
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}

# Functions that pass a layer's output on unchanged, or added to something else, by name.
PASS_ON = ADDITIONS | {"reshape", "view", "dropout"}


def everything(layer: str) -> bool:
    """Select every layer."""
    return True


class Outputs:
    """Inputs and outputs of layers in one micro-batch: tensors in a forward, values of one that was recorded.

    A layer's output is its product, or the sum that the product is added to: the output of a layer that writes to the
    residual stream is the sum with the stream. Once a sum is read by something that does not just pass it on, such as a
    norm, it is not followed into later sums: they depend on the layer's output by another way, too, and are not the
    layer's to repair. Outputs of experts are not recorded: an expert sees other tokens in the dense model.

    Args:
        experts: names of modules that may be experts.

    Attributes:
        sums: by layer, the sums that its output went into: what it was added to, and the sum.
    """

    def __init__(self, experts: frozenset[str]) -> None:
        self._experts = experts
        self.sums: dict[str, list[tuple[Any, Any]]] = {}
        # By layer: the tensor, and how often it had been written to when it was recorded.
        self._inputs: dict[str, tuple[Any, int]] = {}
        self._outputs: dict[str, tuple[Any, int]] = {}
        # The layers whose output a tensor is, by the tensor's id. The tensor is held, so that no other one takes its
        # id. A function may return what it is given.
        self._layers_of: dict[int, tuple[Any, dict[str, None]]] = {}
        # Ids of those tensors that are not followed any more.
        self._read: set[int] = set()

    def follow(
        self, products: list[Product], func: Any, args: tuple, kwargs: dict, operands: Sequence[Any], out: Any
    ) -> None:
        """Record what a call returned, if it multiplied with layers, passed on an output, or added something to it.

        Args:
            products: the products with layers that it made.
            func, args, kwargs, out: the call, and what it returned.
            operands: the tensors among its arguments.
        """
        # alpha scales one of the summands.
        if products or name_of(func) not in PASS_ON or "alpha" in kwargs:
            # Shapes, dtypes and the like are no tensors, and `to` may give back the tensor itself.
            if isinstance(out, Tensor | Value | tuple) and not isinstance(out, torch.Size):
                self._read.update(id(x) for x in operands if id(x) in self._layers_of and x is not out)
            alone = {p.layer.name: p.X for p in products if p.alone and not is_expert(p.layer.name, self._experts)}
            self._inputs |= {layer: (X, X._version) for layer, X in alone.items()}
            self._add(alone, out)
            return
        followed = [self._layers_of[id(x)] for x in args[:2] if id(x) in self._layers_of and id(x) not in self._read]
        for operand, layers in followed:
            if out.numel() == operand.numel() and out.shape[-1] == operand.shape[-1]:
                self._add(layers, out)
                if name_of(func) in ADDITIONS:
                    other = args[1] if operand is args[0] else args[0]
                    for layer in layers:
                        self.sums.setdefault(layer, []).append((other, out))

    def _add(self, layers: Iterable[str], out: Any) -> None:
        """Record a tensor as the output of layers, in addition to those whose output it is already."""
        for layer in [*layers]:
            self._layers_of.setdefault(id(out), (out, {}))[1][layer] = None
            self._outputs[layer] = out, out._version

    def output_of(self, layer: str) -> Tensor | None:
        """A layer's output, (tokens, out); None if there is none, or if it has been written to."""
        return _as_matrix(self._outputs[layer]) if layer in self._outputs else None

    def is_output(self, tensor: Any, layer: str) -> bool:
        """Whether a tensor is the output of a layer, the object itself."""
        return layer in self._outputs and self._outputs[layer][0] is tensor

    def pairs(self, unpadded: Tensor | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, input (tokens, in), zero for padding, and output (tokens, out) of each layer that has both."""
        for layer in self._outputs:
            x, out = _as_matrix(self._inputs[layer], unpadded), self.output_of(layer)
            if x is not None and out is not None:
                yield layer, x, out


def _as_matrix(recorded: tuple[Tensor, int], unpadded: Tensor | None = None) -> Tensor | None:
    """The tensor as a matrix; None if it has been written to since it was recorded."""
    tensor, version = recorded
    return without_padding(tensor, unpadded).reshape(-1, tensor.shape[-1]) if tensor._version == version else None


@dataclass
class _Input:
    """A tensor that layers read: the name of its Gram matrix, and whether a selected layer has read it."""

    gram: str
    taken: bool = False


class Watch:
    """Sees the layers of a block when they are used, in a forward or on its tape.

    Args:
        names: the matrices of the block.
        experts: names of modules that may be experts.
        selected: selects the layers to see.
        take_input: called as take_input(gram, X) once for each input of selected layers, X (tokens, in).
        stage: watch its layers only, and end a micro-batch's forward after them; None: the whole block.
        record_outputs: whether to record outputs of layers.

    Attributes:
        layers: all layers seen so far by name, in the order of use.
        ignored: names of the layers that were seen and not selected, in that order.
        outputs: inputs and outputs of layers in the last micro-batch.
    """

    def __init__(
        self,
        names: WeightNames,
        experts: frozenset[str],
        selected: Selector = everything,
        take_input: Callable[[str, Tensor], None] | None = None,
        stage: Stage | None = None,
        *,
        record_outputs: bool = False,
    ) -> None:
        self._names, self._experts, self._selected = names, experts, functools.cache(selected)
        self._take_input, self._stage, self._record_outputs = take_input, stage, record_outputs
        self._unpadded: Tensor | None = None
        self.layers: dict[str, Layer] = {}
        self.ignored: dict[str, None] = {}
        self._restart()

    def _restart(self) -> None:
        """Begin with another micro-batch."""
        # Inputs that layers have read, by how they are read.
        self._inputs: MutableMapping[Any, dict[Reading, _Input]] = WeakIdKeyDictionary()
        self.outputs = Outputs(self._experts)
        # Whether the layers of the stage have been used.
        self._complete = False

    def through(self, run: Callable[[], Result], unpadded: Tensor | None = None) -> Result | None:
        """Watch one micro-batch on its way through the block, as far as the stage needs it.

        Args:
            run: runs it.
            unpadded: its positions that count; None: all.

        Returns:
            What the run returns; None if it ended before.
        """
        self._restart()
        self._unpadded = unpadded
        try:
            with Calls(self._call):
                return run()
        except ForwardIsOver:
            return None

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        products = [*filter(self.see, products_of(func, args, kwargs, self._names))]
        out = func(*args, **kwargs)
        if self._record_outputs:
            self.outputs.follow(products, func, args, kwargs, tensors_in((args, kwargs)), out)
        return out

    def see(self, product: Product) -> bool:
        """Take the input of a product, if its layer is selected, and belongs to the stage; whether it is so.

        Raises:
            ForwardIsOver: the stage is complete, and a layer reads another input.
        """
        name, X = product.layer.name, product.X
        # The Gram matrix is named after the first layer that reads the input, selected or not. So all experts agree on
        # the name, whichever of them are selected.
        read = self._inputs.setdefault(X, {}).setdefault(product.reading, _Input(name))
        if not (selected := self._selected(name)):
            self.ignored[name] = None
        if self._stage and self._stage.key != kind_of(read.gram, self._experts):
            if self._complete and not self._stage.final:
                raise ForwardIsOver
            return False
        if not selected:
            return False
        if self._take_input and not read.taken:
            read.taken = True
            self._take_input(read.gram, product.reading.rows(without_padding(X, self._unpadded)))
        layer = self.layers.setdefault(name, replace(product.layer, gram=read.gram))
        if layer.gram != read.gram:
            raise InputError(f"{name}: unsupported model: shared its input with {layer.gram}, later with {read.gram}")
        self._complete |= self._stage is not None and self._stage.last == name
        return True
