"""Watch the layers of a block in a forward or on its tape: their inputs and, where wanted, their outputs."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.find_layers import Product, Reading, WeightNames, products_of
from sparsefw.model.layers import Layer, Stage, is_expert, kind_of
from sparsefw.model.padding import without_padding
from sparsefw.model.partial_forward import ForwardIsOver
from sparsefw.model.tape import Calls, Op, Tape, TapeValue

# Called with the name of a layer inside its block, such as "mlp.down_proj.weight" or "mlp.experts.down_proj[3]".
Selector = Callable[[str], bool]

Result = TypeVar("Result")

# Names of functions that add a layer's output to something else.
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}

# Names of functions that pass a layer's output on, unchanged or added to something else.
PASS_ON = ADDITIONS | {"reshape", "view", "dropout"}


def everything(layer: str) -> bool:
    """Select every layer."""
    return True


class Outputs:
    """Inputs and outputs of layers in one micro-batch, as values of a tape.

    A layer's output is its product, or the sum that the product is added to. So the output of a layer that writes to
    the residual stream is the sum with the stream. A sum that is read by a function that does not just pass it on, such
    as a norm, is not followed into later sums: these depend on the layer's output by another way, too, and are not the
    layer's to repair. Outputs of experts are not recorded: in the dense model an expert sees other tokens.

    Args:
        experts: names of modules that may be experts.

    Attributes:
        sums: the sums that a layer's output went into, by layer: what it was added to, and the sum.
        pairs: input and output of each layer.
    """

    def __init__(self, experts: frozenset[str]) -> None:
        self._experts = experts
        self.sums: dict[str, list[tuple[Any, TapeValue]]] = {}
        self.pairs: dict[str, tuple[TapeValue, TapeValue]] = {}
        # The layers whose output a value is, and such values that are not followed any more.
        self._layers_of: dict[TapeValue, dict[str, None]] = {}
        self._read: set[TapeValue] = set()

    def follow(self, op: Op, products: list[Product]) -> None:
        """Record the output of a call that multiplies with layers, passes an output on, or adds something to it.

        Args:
            op: the call.
            products: its products with layers.
        """
        # alpha scales one of the summands.
        if products or op.name not in PASS_ON or "alpha" in op.kwargs:
            # Shapes and dtypes are no tensors, and `to` may return its argument.
            if op.outputs:
                self._read.update(x for x in op.inputs if x in self._layers_of and x is not op.out)
            for p in products:
                if p.alone and not is_expert(p.layer.name, self._experts):
                    self._add(p.layer.name, p.X, op.out)
            return
        followed = [x for x in op.args[:2] if isinstance(x, TapeValue) and x in self._layers_of and x not in self._read]
        for x in followed:
            if op.out.shape.numel() != x.shape.numel() or op.out.shape[-1] != x.shape[-1]:
                continue
            for layer in [*self._layers_of[x]]:
                self._add(layer, self.pairs[layer][0], op.out)
                if op.name in ADDITIONS:
                    other = op.args[1] if x is op.args[0] else op.args[0]
                    self.sums.setdefault(layer, []).append((other, op.out))

    def _add(self, layer: str, X: TapeValue, out: TapeValue) -> None:
        """Record the output of a layer. A value may be the output of several layers."""
        self._layers_of.setdefault(out, {})[layer] = None
        self.pairs[layer] = X, out


@dataclass
class _Input:
    """A tensor that layers read: the name of its Gram matrix, and whether a selected layer has read it."""

    gram: str
    taken: bool = False


class Watch:
    """Watches the layers of a block in a forward, or on its tape.

    Args:
        names: the matrices of the block.
        experts: names of modules that may be experts.
        selected: selects the layers to watch.
        take_input: called as take_input(gram, X) once for each input of selected layers, X (tokens, in).
        stage: watch its layers only, and end a micro-batch's forward after them; None: watch the whole block.
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
        self._restart(None)

    def _restart(self, unpadded: Tensor | None) -> None:
        """Begin with another micro-batch."""
        self._unpadded = unpadded
        self._tape = Tape((), self._names.holds)
        # Inputs that layers have read, by how they are read.
        self._inputs: dict[tuple[TapeValue, Reading], _Input] = {}
        self.outputs = Outputs(self._experts)
        # The tensors of the values in `outputs`.
        self._tensors: dict[TapeValue, Tensor] = {}
        # Whether the layers of the stage have been used.
        self._complete = False

    def through(self, run: Callable[[], Result], unpadded: Tensor | None = None) -> Result | None:
        """Watch one micro-batch on its way through the block, as far as the stage needs it.

        Args:
            run: runs it.
            unpadded: its positions that count; None: all.

        Returns:
            The result of the run; None if it ended before.
        """
        self._restart(unpadded)
        try:
            with Calls(self._call):
                return run()
        except ForwardIsOver:
            return None

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        out, op, operands = self._tape.call(func, args, kwargs)
        assert op is not None
        tensors = dict(zip(op.inputs, operands, strict=True))
        products = [p for p in products_of(op, self._names) if self.see(p, tensors[p.X])]
        if self._record_outputs:
            self.outputs.follow(op, products)
            if isinstance(out, Tensor):
                tensors[op.out] = out
            self._tensors |= {x: tensors[x] for pair in self.outputs.pairs.values() for x in pair if x in tensors}
        return out

    def see(self, product: Product, X: Tensor | None = None) -> bool:
        """Take the input of a product if its layer is selected and belongs to the stage; returns whether it does.

        Raises:
            ForwardIsOver: the stage is complete, and a layer reads another input.
        """
        name = product.layer.name
        # The Gram matrix is named after the first layer that reads the input, selected or not. So all experts agree on
        # the name, whichever of them are selected.
        read = self._inputs.setdefault((product.X, product.reading), _Input(name))
        if not (selected := self._selected(name)):
            self.ignored[name] = None
        if self._stage and self._stage.key != kind_of(read.gram, self._experts):
            if self._complete and not self._stage.final:
                raise ForwardIsOver
            return False
        if not selected:
            return False
        if self._take_input and X is not None and not read.taken:
            read.taken = True
            self._take_input(read.gram, product.reading.rows(without_padding(X, self._unpadded)))
        layer = self.layers.setdefault(name, replace(product.layer, gram=read.gram))
        if layer.gram != read.gram:
            raise InputError(f"{name}: unsupported model: shared its input with {layer.gram}, later with {read.gram}")
        self._complete |= self._stage is not None and self._stage.last == name
        return True

    def output_of(self, layer: str) -> Tensor | None:
        """The output of a layer, (tokens, out); None: not recorded, or written to since."""
        pair = self.outputs.pairs.get(layer)
        return self._matrix(pair[1]) if pair else None

    def pairs(self, unpadded: Tensor | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, input (tokens, in), zero for padding, and output (tokens, out) of each layer that has both."""
        for layer, (read, made) in self.outputs.pairs.items():
            X, out = self._matrix(read, unpadded), self._matrix(made)
            if X is not None and out is not None:
                yield layer, X, out

    def _matrix(self, value: TapeValue, unpadded: Tensor | None = None) -> Tensor | None:
        """A value as a matrix; None if its tensor was written to since."""
        x = self._tensors[value]
        return without_padding(x, unpadded).reshape(-1, x.shape[-1]) if self._tape.value(x) is value else None
