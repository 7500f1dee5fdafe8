"""The prunable layers of a block, found where they are used, and the Gram matrices of their inputs.

No list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's own
parameters. So transposed layouts and the experts of a mixture, slices of one 3-D parameter, are found too. Layers
that read the same input share its Gram matrix.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.errors import InputError

# Small and decisive: the matrices that choose experts, and convolutions, stay dense.
KEPT_DENSE = re.compile(r"(^|\.)(router|gate|shared_expert_gate)\.weight$|conv1d")

# What sets an expert apart in a layer's name: the slice of a stacked parameter, or the place in a list of modules.
_EXPERT = re.compile(r"\[\d+\]|(?<=\.)\d+(?=\.)")

# Position of the input and of the weight among the arguments, and whether the weight is stored (in, out).
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    nn.functional.linear: (0, 1, False),
    torch.matmul: (0, 1, True),
    torch.Tensor.matmul: (0, 1, True),
    torch.Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
    torch.addmm: (1, 2, True),
}

# What a layer puts out may pass through these and is what it was, or a sum with what it was.
_PASSED_ON = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__iadd__,
    torch.Tensor.__radd__,
    torch.reshape,
    torch.Tensor.reshape,
    torch.Tensor.view,
    nn.functional.dropout,
}

# Runs one micro-batch, by its number, through a block.
Run = Callable[[int], object]


@dataclass(frozen=True)
class Layer:
    """One prunable matrix.

    Attributes:
        name: parameter name inside the block; an expert's slice carries its index, "experts.down_proj[3]".
        weight: (out, in) view of the block's own parameter: writing to it changes the block.
        gram: name of the layer whose Gram matrix this one shares, often its own.
    """

    name: str
    weight: Tensor
    gram: str


@dataclass(frozen=True)
class Stage:
    """Layers that are pruned before the inputs of later ones are measured: those of one input, or alike in all experts.

    Attributes:
        key: the name of their Gram matrix, without an expert's index.
        last: the layer after which a micro-batch has no more of them; None where it may have.
        final: whether no stage follows; its micro-batches run through to the end of the block.
        moves: whether the dense model's micro-batches do, and move on to the next block. It is the final stage or,
            where that one's layers put out what the block does, the one before: what they should put out is there then.
    """

    key: str
    last: str | None
    final: bool = False
    moves: bool = False


# What the dense model's layers put out for a micro-batch: by its number, and then by the layer's name.
DenseOutputs = Callable[[int], Callable[[str], Tensor | None]]


class _Enough(Exception):
    """Ends a block's forward where the rest of it has nothing more to tell."""


def found(block: nn.Module, run: Callable[[], object]) -> list[Layer]:
    """The layers of a block in the order of use, as `run`, one micro-batch through the block, shows them."""
    return list(_watched(block, run).layers.values())


def _watched(block: nn.Module, run: Callable[[], object], *, outputs: bool = False) -> "_Watch":
    watch = _Watch(block, outputs=outputs)
    watch.through(run)
    return watch


def stages(block: nn.Module, run: Callable[[], object]) -> list[Stage]:
    """The stages of a block in the order of use, as `run`, which gives a micro-batch after the block, shows them."""
    out: list[object] = []
    watch = _watched(block, lambda: out.append(run()), outputs=True)
    by_key: dict[str, list[Layer]] = {}
    for layer in watch.layers.values():
        by_key.setdefault(kind_of(layer.gram), []).append(layer)
    final, ahead = len(by_key) - 1, 0
    if final > 0:
        put_out = [watch.outputs.get(layer.name, (None,))[0] for layer in list(by_key.values())[final]]
        ahead = int(all(one is out[0] for one in put_out))
    return [
        Stage(key, alike[-1].name if key == alike[0].gram else None, n == final, n == final - ahead)
        for n, (key, alike) in enumerate(by_key.items())
    ]


def dense_outputs(block: nn.Module, run: Run, stage: Stage | None = None) -> DenseOutputs:
    """What a stage's layers put out in the dense model, whose block and micro-batches these are.

    A micro-batch is run as far as the stage needs it; where the stage moves them on, to the end.
    """

    def put_out(j: int) -> Callable[[str], Tensor | None]:
        # A new one for each: what it keeps goes with it.
        watch = _Watch(block, stage=stage, outputs=True, on=stage is not None and stage.moves)
        watch.through(lambda: run(j))
        return watch.output_of

    return put_out


def capture(
    block: nn.Module,
    run: Run,
    batches: Iterable[int],
    *,
    ops: ModuleType,
    precision: str,
    stage: Stage | None = None,
    dense: DenseOutputs | None = None,
) -> tuple[list[Layer], dict[str, Tensor], dict[str, Tensor]]:
    """Run a block over its calibration inputs; find its layers and accumulate the Gram matrices of their inputs.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it.
        batches: the micro-batches.
        ops: the operations; `ops.gram_accumulate` and `ops.cross_accumulate` are used.
        precision: of fp32 inputs, "ieee" or "tf32".
        stage: only its layers, and no more of the block than they need.
        dense: what the layers of the dense model put out: cross matrices are accumulated too.

    Returns:
        The layers in the order of use; Gram matrices (in, in) fp32 by `Layer.gram`; and with `dense` cross matrices
        (out, in) fp32 by layer, see `target`: of all but experts, which are sent other tokens than in the dense model.

    Raises:
        InputError: a layer shares its input with different layers from one micro-batch to the next.
    """
    grams: dict[str, Tensor] = {}
    crosses: dict[str, Tensor] = {}

    def accumulate(name: str, x: Tensor) -> None:
        if name not in grams:
            grams[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        ops.gram_accumulate(grams[name], x, precision=precision)

    def accumulate_lacks(should_of: Callable[[str], Tensor | None]) -> None:
        for name, x, output in watch.put_out():
            should = should_of(name)
            if should is None or should.shape != output.shape:
                continue
            if name not in crosses:
                crosses[name] = torch.zeros(output.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            # In one rounding, whatever the dtype: torch subtracts in fp32.
            ops.cross_accumulate(crosses[name], (should - output).to(x.dtype), x, precision=precision)

    watch = _Watch(block, accumulate, stage, outputs=dense is not None)
    for j in batches:
        watch.through(lambda j=j: run(j))
        if dense:
            accumulate_lacks(dense(j))
    return list(watch.layers.values()), grams, crosses


def not_pruned(block: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the block's matrices that are not among the layers: routers, convolutions, experts without tokens."""
    layers, names = set(layers), []
    for name, parameter in block.named_parameters():
        slices = [f"{name}[{e}]" for e in range(len(parameter))] if parameter.dim() == 3 else []
        if layers.isdisjoint(slices) and parameter.dim() >= 2 and name not in layers:
            names.append(name)
        elif slices:
            names += [one for one in slices if one not in layers]
    return names


def kind_of(name: str) -> str:
    """A layer's name without an expert's index: the same for all experts."""
    return _EXPERT.sub("*", name)


class _Watch(TorchFunctionMode):
    """Sees the layers of a block when they are used.

    Args:
        block: the block.
        take: called as take(gram, input as a matrix), once for each input.
        stage: watch its layers only, and end a micro-batch after them.
        outputs: keep what layers put out: their product or, where that is only added to something, the sum. A layer
            that writes to the residual stream puts out the stream.
        on: after the stage's layers let a micro-batch run on unseen instead.
    """

    def __init__(
        self,
        block: nn.Module,
        take: Callable[[str, Tensor], None] = lambda gram, x: None,
        stage: Stage | None = None,
        *,
        outputs: bool = False,
        on: bool = False,
    ):
        super().__init__()
        self.take, self.stage, self.keep, self.on = take, stage, outputs, on
        self.own = [(p.untyped_storage().data_ptr(), p.storage_offset(), p, n) for n, p in block.named_parameters()]
        self.layers: dict[str, Layer] = {}
        # Of one micro-batch, by identity, with the tensor itself, which keeps the identity taken: the input of which
        # Gram matrix, and the output of which layers.
        self.inputs: dict[int, tuple[Tensor, str]] = {}
        self.origins: dict[int, tuple[Tensor, tuple[str, ...]]] = {}
        # By layer: its input and output, and how often each had been written to.
        self.products: dict[str, tuple[Tensor, int]] = {}
        self.outputs: dict[str, tuple[Tensor, int]] = {}
        # Whether a micro-batch has passed all layers of the stage, and has been seen as far as it should be.
        self.complete = self.over = False

    def through(self, run: Callable[[], object]) -> None:
        """Watch one micro-batch on its way through the block, as far as the stage needs it."""
        for kept in (self.inputs, self.origins, self.products, self.outputs):
            kept.clear()
        self.complete = self.over = False
        try:
            with self:
                run()
        except _Enough:
            pass

    def put_out(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Layer, input and output, both as matrices, of the last micro-batch."""
        for name in self.outputs:
            x, output = _unwritten(self.products[name]), self.output_of(name)
            if x is not None and output is not None:
                yield name, x, output

    def output_of(self, name: str) -> Tensor | None:
        """A layer's output of the last micro-batch, as a matrix."""
        return _unwritten(self.outputs[name]) if name in self.outputs else None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, None
        if func in _PRODUCTS and not self.over:
            i, w, transposed = _PRODUCTS[func]
            weight = args[w] if len(args) > w else kwargs.get("weight")
            if weight is not None and weight.dim() == 2:
                name = self._see(args[i] if len(args) > i else kwargs["input"], weight.T if transposed else weight)
        out = func(*args, **kwargs)
        if self.over:
            return out
        if self.keep and name:
            self._put_out((name,), out)
        elif self.keep and func in _PASSED_ON and "alpha" not in kwargs:
            for operand, names in [self.origins[id(x)] for x in args[:2] if id(x) in self.origins]:
                if out.numel() == operand.numel() and out.shape[-1] == operand.shape[-1]:
                    self._put_out(names, out)
        return out

    def _see(self, x: Tensor, weight: Tensor) -> str | None:
        """The name of the layer, where it is to be watched."""
        name = self._name(weight)
        if name is None:
            return None
        known = id(x) in self.inputs
        if self.stage and not known and self.stage.key != kind_of(name):
            if self.complete and not self.stage.final:
                if not self.on:
                    raise _Enough
                self.over = True
            return None
        if KEPT_DENSE.search(name):
            return None
        if not known:
            self.inputs[id(x)] = (x, name)
            self.take(name, x.reshape(-1, x.shape[-1]))
        gram = self.inputs[id(x)][1]
        layer = self.layers.setdefault(name, Layer(name, weight, gram))
        if layer.gram != gram:
            raise InputError(f"{name}: unsupported model: shared its input with {layer.gram}, later with {gram}")
        self.products[name] = (x, x._version)
        self.complete = self.complete or (self.stage is not None and self.stage.last == name)
        return name

    def _put_out(self, names: tuple[str, ...], out: Tensor) -> None:
        names = tuple(name for name in names if kind_of(name) == name)
        _, others = self.origins.get(id(out), (out, ()))
        self.origins[id(out)] = (out, tuple(dict.fromkeys((*others, *names))))
        for name in names:
            self.outputs[name] = (out, out._version)

    def _name(self, weight: Tensor) -> str | None:
        storage, offset = weight.untyped_storage().data_ptr(), weight.storage_offset()
        for data, start, parameter, name in self.own:
            if data == storage and start <= offset < start + parameter.numel():
                whole = parameter if parameter.dim() == 2 else parameter[0]
                if weight.numel() != whole.numel():
                    # Only a part of the matrix is used here: not a layer, and reported as kept dense.
                    return None
                return name if parameter.dim() == 2 else f"{name}[{(offset - start) // parameter.stride(0)}]"
        return None


def _unwritten(kept: tuple[Tensor, int]) -> Tensor | None:
    """The tensor as a matrix, unless it has been written to since: then it is no longer what it was kept for."""
    tensor, version = kept
    return tensor.reshape(-1, tensor.shape[-1]) if tensor._version == version else None
