"""Watch a block's forward: see each layer when it is used, with its input and, where asked for, its output."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.errors import InputError
from sparsefw.model.layers.names import Layer, WeightNames
from sparsefw.model.layers.outputs import Outputs
from sparsefw.model.layers.products import Product, Reading, products_of
from sparsefw.model.layers.stage import Progress, Stage, StageIsOver

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
        tensor: the tensor.
        gram: name of its Gram matrix.
        held: the tensor, if a layer of the stage reads it: its id is no other tensor's then.
        taken: whether a selected layer has read it.
    """

    tensor: weakref.ref[Tensor]
    gram: str
    held: Tensor | None = None
    taken: bool = False


class Watch(TorchFunctionMode):
    """Sees the layers of a block when they are used.

    Args:
        block: the block.
        selected: selects the layers to see.
        take_input: called as take_input(gram, X) once for each input of selected layers, X (tokens, in).
        stage: watch its layers only, and end a micro-batch's forward after them; None: the whole block.
        record_outputs: whether to record outputs of layers.
        run_on: after the stage, let a micro-batch run on unwatched instead of ending its forward.
        experts: as for `WeightNames`.

    Attributes:
        layers: all layers seen so far by name, in the order of use.
        ignored: names of the layers that were seen and not selected.
        outputs: inputs and outputs of layers in the last micro-batch.
        experts: see `WeightNames`.
    """

    def __init__(
        self,
        block: nn.Module,
        selected: Selector = everything,
        take_input: Callable[[str, Tensor], None] = lambda gram, X: None,
        stage: Stage | None = None,
        *,
        record_outputs: bool = False,
        run_on: bool = False,
        experts: frozenset[str] | None = None,
    ) -> None:
        super().__init__()
        self._names, self._selected = WeightNames(block, experts), functools.cache(selected)
        self._take_input, self.experts = take_input, self._names.experts
        self._progress, self._record_outputs = Progress(stage, run_on, self.experts), record_outputs
        self.layers: dict[str, Layer] = {}
        self._ignored: dict[str, None] = {}
        # Inputs that layers of the micro-batch have read, by the tensor's id and how it is read.
        self._inputs: dict[tuple[int, Reading], _Input] = {}
        self.outputs = Outputs(self.experts)

    @property
    def ignored(self) -> list[str]:
        """See the class."""
        return list(self._ignored)

    def through(self, run: Callable[[], Result]) -> Result | None:
        """Watch one micro-batch on its way through the block, as far as the stage needs it.

        Returns:
            What the run returns; None if it ended before.
        """
        self._inputs.clear()
        self.outputs.clear()
        self._progress.restart()
        try:
            with self:
                return run()
        except StageIsOver:
            return None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        layers = [] if self._progress.over else self._layers_of(func, args, kwargs)
        out = func(*args, **kwargs)
        if self._record_outputs and not self._progress.over:
            if layers:
                self.outputs.note_read(args, kwargs, out)
                if alone := tuple(name for name, product in layers if product.alone):
                    self.outputs.add_output(alone, out)
            else:
                self.outputs.follow(func, args, kwargs, out)
        return out

    def _layers_of(self, func: Any, args: tuple, kwargs: dict) -> list[tuple[str, Product]]:
        """Names and products of the layers that a function call multiplies with; none if it is nothing to be seen."""
        return [
            (name, product)
            for product in products_of(func, args, kwargs, self._names.is_weight)
            if (name := self._names.find(product.weight)) and self._see(name, product)
        ]

    def _see(self, name: str, product: Product) -> bool:
        """Take the input of a product; whether the layer is selected, and belongs to the stage."""
        X, reading = product.X, product.reading
        key = id(X), reading
        selected = self._selected(name)
        if not selected:
            self._ignored[name] = None
        layer_input = self._inputs.get(key)
        if layer_input is None or layer_input.tensor() is not X:
            # The Gram matrix is named after the first layer that reads the input, selected or not. So all experts agree
            # on the name, whichever of them are selected.
            layer_input = self._inputs[key] = _Input(weakref.ref(X), name)
        if not self._progress.includes(layer_input.gram):
            return False
        layer_input.held = X
        if not selected:
            return False
        if not layer_input.taken:
            layer_input.taken = True
            self._take_input(layer_input.gram, reading.rows(X))
        if name not in self.layers:
            _, transposed = self._names.locate(product.weight)
            self.layers[name] = Layer(name, product.weight, layer_input.gram, product.bias, product.at_once, transposed)
        layer = self.layers[name]
        if layer.gram != layer_input.gram:
            raise InputError(
                f"{name}: unsupported model: shared its input with {layer.gram}, later with {layer_input.gram}"
            )
        if self._record_outputs and product.alone:
            self.outputs.add_input(name, X)
        self._progress.passed(name)
        return True
