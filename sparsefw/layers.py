"""The prunable layers of a block, found where they are used, and the Gram matrices of their inputs.

No list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's own
parameters. So transposed layouts and the experts of a mixture, slices of one 3-D parameter, are found too. Layers
that read the same input share its Gram matrix.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.errors import InputError

# Small and decisive: the matrices that choose experts, and convolutions, stay dense.
KEPT_DENSE = re.compile(r"(^|\.)(router|gate|shared_expert_gate)\.weight$|conv1d")

# Position of the input and of the weight among the arguments, and whether the weight is stored (in, out).
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    nn.functional.linear: (0, 1, False),
    torch.matmul: (0, 1, True),
    torch.Tensor.matmul: (0, 1, True),
    torch.Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
    torch.addmm: (1, 2, True),
}


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


def capture(
    block: nn.Module, run: Callable[[], None], *, ops: ModuleType, precision: str
) -> tuple[list[Layer], dict[str, Tensor], list[str]]:
    """Run a block over its calibration inputs; find its layers and accumulate their Gram matrices.

    Args:
        block: the block, on its device.
        run: runs all micro-batches through it.
        ops: the operations; `ops.gram_accumulate` is used.
        precision: of fp32 inputs, "ieee" or "tf32".

    Returns:
        The layers in the order of use; Gram matrices (in, in) fp32 by layer name; and the names of matrices that
        were not seen or are kept dense (routers, convolutions, experts that no token reached).

    Raises:
        InputError: a layer shares its input with different layers from one micro-batch to the next.
    """
    watch = _Watch(block, ops, precision)
    # Before each micro-batch the inputs seen in the last one are forgotten.
    handle = block.register_forward_pre_hook(lambda *_: watch.inputs.clear())
    try:
        with watch:
            run()
    finally:
        handle.remove()
        watch.inputs.clear()
    dense = [name for name, p in block.named_parameters() if p.dim() >= 2 and name not in watch.parameters]
    dense += [
        f"{name}[{e}]"
        for name, p in block.named_parameters()
        if p.dim() == 3 and name in watch.parameters
        for e in range(len(p))
        if f"{name}[{e}]" not in watch.layers
    ]
    return list(watch.layers.values()), watch.grams, dense


class _Watch(TorchFunctionMode):
    def __init__(self, block: nn.Module, ops: ModuleType, precision: str):
        super().__init__()
        self.ops, self.precision = ops, precision
        self.own = [(p.untyped_storage().data_ptr(), p.storage_offset(), p, n) for n, p in block.named_parameters()]
        self.layers: dict[str, Layer] = {}
        self.grams: dict[str, Tensor] = {}
        self.parameters: set[str] = set()
        # By identity of the input tensor: the tensor itself (which keeps the identity taken) and its Gram's name.
        self.inputs: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            i, w, transposed = _PRODUCTS[func]
            weight = args[w] if len(args) > w else kwargs.get("weight")
            if weight is not None and weight.dim() == 2:
                self._see(args[i] if len(args) > i else kwargs["input"], weight.T if transposed else weight)
        return func(*args, **kwargs)

    def _see(self, x: Tensor, weight: Tensor) -> None:
        name = self._name(weight)
        if name is None or KEPT_DENSE.search(name):
            return
        self.parameters.add(name.partition("[")[0])
        if id(x) not in self.inputs:
            self.inputs[id(x)] = (x, name)
            self._accumulate(name, x)
        gram = self.inputs[id(x)][1]
        layer = self.layers.setdefault(name, Layer(name, weight, gram))
        if layer.gram != gram:
            raise InputError(f"{name}: unsupported model: shared its input with {layer.gram}, later with {gram}")

    def _accumulate(self, name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        if name not in self.grams:
            self.grams[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        self.ops.gram_accumulate(self.grams[name], x, precision=self.precision)

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
