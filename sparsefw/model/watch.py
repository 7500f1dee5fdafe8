"""Watch the layers of a block in a forward, or on a tape: take their inputs and, if wanted, record their outputs."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.find_layers import Product, Reading, WeightNames, products_of
from sparsefw.model.layers import Experts, Layer, Stage, is_expert, kind_of
from sparsefw.model.padding import without_padding
from sparsefw.model.partial_forward import ForwardIsOver
from sparsefw.model.tape import Calls, Op, Operands, Tape, TapeValue

# Called with the name of a layer inside its block, such as "mlp.down_proj.weight" or "mlp.experts.down_proj[3]".
Selector = Callable[[str], bool]

Result = TypeVar("Result")

# Names of functions that add a layer's output to something else.
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}

# Names of functions whose result still counts as a layer's output: sums, and the same values in another shape.
PASS_ON = ADDITIONS | {"reshape", "view", "dropout"}


def everything(layer: str) -> bool:
    """Select every layer."""
    return True


class Outputs:
    """Inputs and outputs of layers in one micro-batch, as values of a tape.

    A layer's output is its product, or a later sum that includes the product. So the output of a layer that writes to
    the residual stream is the stream after it. The last such sum counts. But once a function outside of PASS_ON (such
    as a norm) reads a sum, later sums do not count: they depend on the layer in a second way, and the layer alone
    cannot correct them. Outputs of experts are not recorded, since in the dense model an expert sees other tokens.

    Args:
        experts: names of modules that may be experts.

    Attributes:
        sums: for each layer, the sums that include its product: the other summand and the sum, in order.
        pairs: input and output of each layer.
    """

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self.sums: dict[str, list[tuple[Any, TapeValue]]] = {}
        self.pairs: dict[str, tuple[TapeValue, TapeValue]] = {}
        # The layers whose output is this value.
        self._layers_of: dict[TapeValue, dict[str, None]] = {}
        # Outputs that a function outside of PASS_ON has read.
        self._read: set[TapeValue] = set()

    def follow(self, op: Op, products: list[Product]) -> None:
        """Record the output of a call if it is a product with a layer, or a function of PASS_ON on a layer's output.

        Args:
            op: the call.
            products: the call's products with layers.
        """
        # A sum with alpha scales a summand, so it does not count as a sum.
        if products or op.name not in PASS_ON or "alpha" in op.kwargs:
            # Not a read: a call for the shape or dtype returns no tensor, and `to` may return its argument.
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
    """An input of layers: the name of its Gram matrix, and whether `take_input` has been called with it."""

    gram: str
    taken: bool = False


class Watch:
    """Watches the layers of a block in a forward, or on its tape.

    Args:
        names: finds the names of the block's matrices.
        experts: names of modules that may be experts.
        selected: selects layers by name.
        take_input: called as take_input(gram, X) once for each input of selected layers, X (tokens, in).
        stage: watch only this stage's layers, and end each forward after them; None: watch the whole block.
        record_outputs: whether to record outputs of layers.

    Attributes:
        layers: the selected layers so far by name, in the order of use.
        ignored: names of the layers that `selected` has left out, in the order of use.
        outputs: inputs and outputs of layers in the last micro-batch.
    """

    def __init__(
        self,
        names: WeightNames,
        experts: Experts,
        selected: Selector,
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
        """Forget the last micro-batch before the next one."""
        self._unpadded = unpadded
        self._tape = Tape((), self._names.holds)
        # The inputs of layers, by the tensor and the way in which products read it.
        self._inputs: dict[tuple[TapeValue, Reading], _Input] = {}
        self.outputs = Outputs(self._experts)
        # The tensors of the values in `outputs`.
        self._tensors: dict[TapeValue, Tensor] = {}
        # Whether all layers of the stage have been used.
        self._complete = False

    def through(self, run: Callable[[], Result], unpadded: Tensor | None = None) -> Result | None:
        """Watch one micro-batch on its way through the block, as far as the stage needs it.

        Args:
            run: runs the micro-batch.
            unpadded: the micro-batch's positions without padding; None: all.

        Returns:
            The result of the run; None if the run was ended after the stage.
        """
        self._restart(unpadded)
        try:
            with Calls(self._call):
                return run()
        except ForwardIsOver:
            return None

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        products = list[Product]()

        def find_products(op: Op, tensors: Operands) -> None:
            # Before the call: the first product after the stage is not computed any more.
            products.extend(p for p in products_of(op, self._names) if self.see(p, tensors[p.X]))

        out, op, tensors = self._tape.call(func, args, kwargs, find_products)
        assert op is not None
        if self._record_outputs:
            self.outputs.follow(op, products)
            if isinstance(out, Tensor):
                tensors[op.out] = out
            self._tensors |= {x: tensors[x] for pair in self.outputs.pairs.values() for x in pair if x in tensors}
        return out

    def see(self, product: Product, X: Tensor | None = None) -> bool:
        """Take the input of a product if its layer is selected and belongs to the stage; returns whether this is so.

        Raises:
            ForwardIsOver: the stage is complete, and a layer reads another input.
        """
        name = product.layer.name
        # The Gram matrix has the name of the first layer that reads the input, selected or not. So the names are alike
        # for all experts, though different experts may have selected layers.
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
            raise InputError(
                f"{name}: unsupported model: it first shared its input with {layer.gram}, and later with {read.gram}"
            )
        self._complete |= self._stage is not None and self._stage.last == name
        return True

    def output_of(self, layer: str) -> Tensor | None:
        """The output of a layer, (tokens, out); None if it was not recorded, or was overwritten later."""
        pair = self.outputs.pairs.get(layer)
        return self._matrix(pair[1]) if pair else None

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, input (tokens, in) and output (tokens, out) of each layer with both; inputs at padding are 0."""
        for layer, (read, made) in self.outputs.pairs.items():
            X, out = self._matrix(read, self._unpadded), self._matrix(made)
            if X is not None and out is not None:
                yield layer, X, out

    def _matrix(self, value: TapeValue, unpadded: Tensor | None = None) -> Tensor | None:
        """The tensor of a value as a matrix; None if the tensor was overwritten later."""
        x = self._tensors[value]
        return without_padding(x, unpadded).reshape(-1, x.shape[-1]) if self._tape.value(x) is value else None
