"""See the layers of a block when they are used, with their inputs and, where wanted, their outputs."""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.layers.block_tape import BlockTape
from sparsefw.model.layers.names import Layer, WeightNames, kind_of
from sparsefw.model.layers.outputs import Outputs
from sparsefw.model.layers.products import Product, Reading, products_of
from sparsefw.model.layers.stage import Stage
from sparsefw.model.parts import PartIsOver
from sparsefw.model.tape import Calls, tensors_in

# Called with the name of a layer inside its block, such as "mlp.down_proj.weight" or "mlp.experts.down_proj[3]".
Selector = Callable[[str], bool]

Result = TypeVar("Result")


def everything(layer: str) -> bool:
    """Select every layer."""
    return True


@dataclass
class _Input:
    """A tensor that layers read.

    Attributes:
        tensor: the tensor. Another one may have its id when it is gone.
        gram: name of its Gram matrix.
        taken: whether a selected layer has read it.
    """

    tensor: weakref.ref[Any]
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
        self.layers: dict[str, Layer] = {}
        self.ignored: dict[str, None] = {}
        self._restart()

    def _restart(self) -> None:
        """Begin with another micro-batch."""
        # Inputs that layers have read, by the tensor's id and how it is read.
        self._inputs: dict[tuple[int, Reading], _Input] = {}
        self.outputs = Outputs(self._experts)
        # Whether the layers of the stage have been used.
        self._complete = False

    def through(self, run: Callable[[], Result]) -> Result | None:
        """Watch one micro-batch on its way through the block, as far as the stage needs it.

        Returns:
            What the run returns; None if it ended before.
        """
        self._restart()
        try:
            with Calls(self._call):
                return run()
        except PartIsOver:
            return None

    def look(self, tape: BlockTape) -> None:
        """See the layers of a recorded forward. What is recorded of outputs are its values."""
        for op in tape.ops:
            products = [product for product in tape.products.get(op.number, ()) if self._see(product)]
            self._follow(products, op.function, op.args, op.kwargs, op.inputs, op.out)

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call of a forward."""
        products = [product for product in products_of(func, args, kwargs, self._names) if self._see(product)]
        out = func(*args, **kwargs)
        if self._record_outputs:
            self._follow(products, func, args, kwargs, tensors_in((args, kwargs)), out)
        return out

    def _follow(
        self, products: list[Product], func: Any, args: tuple, kwargs: dict, operands: Sequence[Any], out: Any
    ) -> None:
        if products:
            self.outputs.add(products, operands, out)
        else:
            self.outputs.follow(func, args, kwargs, operands, out)

    def _see(self, product: Product) -> bool:
        """Take the input of a product; whether the layer is selected, and belongs to the stage."""
        name, X, key = product.layer, product.X, (id(product.X), product.reading)
        selected = self._selected(name)
        if not selected:
            self.ignored[name] = None
        layer_input = self._inputs.get(key)
        if layer_input is None or layer_input.tensor() is not X:
            # The Gram matrix is named after the first layer that reads the input, selected or not. So all experts agree
            # on the name, whichever of them are selected.
            layer_input = self._inputs[key] = _Input(weakref.ref(X), name)
        if not self._includes(layer_input.gram) or not selected:
            return False
        if not layer_input.taken:
            layer_input.taken = True
            if self._take_input:
                self._take_input(layer_input.gram, product.reading.rows(X))
        if name not in self.layers:
            self.layers[name] = Layer(
                name, product.weight, layer_input.gram, product.bias, product.at_once, product.transposed
            )
        layer = self.layers[name]
        if layer.gram != layer_input.gram:
            raise InputError(
                f"{name}: unsupported model: shared its input with {layer.gram}, later with {layer_input.gram}"
            )
        self._complete |= self._stage is not None and self._stage.last == name
        return True

    def _includes(self, gram: str) -> bool:
        """Whether layers of a Gram matrix belong to the stage.

        Raises:
            PartIsOver: the stage is complete, and these layers read another input.
        """
        if self._stage is None or self._stage.key == kind_of(gram, self._experts):
            return True
        if self._complete and not self._stage.final:
            raise PartIsOver
        return False
