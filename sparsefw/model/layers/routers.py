"""Find the matrices that are multiplied with an input and stay dense.

Most of them decide what a block does: routers, and gates of a single number. They are small, and much depends on them.
Names tell of most of them. The others are known by what the forward does with them.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.model.layers.names import KEPT_DENSE, WeightNames
from sparsefw.model.layers.products import MIXING, Product, Reading, products_of
from sparsefw.model.parts import tensors_in

# Functions that choose among the entries of a tensor, by name.
_CHOOSING = {"topk", "argmax", "argmin", "sort", "argsort", "msort", "kthvalue", "multinomial"}

# Functions that cut a tensor into parts, by name. Others that change the number of entries add them up, or combine them
# with other tensors.
_CUTTING = {"__getitem__", "chunk", "split", "narrow", "unbind", "select", "tensor_split", "split_with_sizes"}

# Functions that raise a weight to fp32 whatever the precision of the model, by name.
_RAISING = {"float", "double", "type"}


@dataclass(frozen=True)
class _Values:
    """A tensor whose entries follow from the outputs of matrices, each from one output of each matrix.

    Attributes:
        tensor: the tensor.
        version: how often it had been written to.
        layers: names of the matrices.
    """

    tensor: weakref.ref[Tensor]
    version: int
    layers: frozenset[str]


class _Decisions(TorchFunctionMode):
    """Follows the outputs of all matrices through a block's forward, entry by entry.

    Attributes:
        found: names of the matrices that decide something by themselves.
        readers: by name of a matrix, the matrices whose outputs it reads.
        first: by name of a matrix, the first matrices that read what it reads.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._names = WeightNames(block)
        self._values: dict[int, _Values] = {}
        self.found: set[str] = set()
        self.readers: dict[str, set[str]] = {}
        self.first: dict[str, set[str]] = {}
        self._inputs: dict[tuple[int, Reading], tuple[weakref.ref[Tensor], str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, function = kwargs or {}, getattr(func, "__name__", str(func))
        operands = tensors_in((args, kwargs))
        followed = [(x, self._layers_of(x)) for x in operands]
        versions = [x._version for x in operands]
        if function in _RAISING and operands and (name := self._names.find(operands[0])):
            self.found.add(name)
        if function in _CHOOSING:
            self.found.update(*(layers for _, layers in followed))
        multiplied = set()
        for product in products_of(func, args, kwargs, self._names.is_weight):
            if name := self._names.find(product.weight):
                multiplied.add(name)
                self.readers.setdefault(name, set()).update(self._layers_of(product.X))
                self.first.setdefault(name, set()).add(self._first_reader(product, name))
                if KEPT_DENSE.search(name) or product.weight.shape[0] == 1:
                    self.found.add(name)
        out = func(*args, **kwargs)
        written = [x for x, version in zip(operands, versions, strict=True) if x._version != version]
        for made in [*tensors_in(out), *written]:
            if function in MIXING:
                layers = multiplied
            else:
                same = function in _CUTTING
                layers = {name for x, names in followed if same or x.numel() == made.numel() for name in names}
            if layers:
                self._values[id(made)] = _Values(weakref.ref(made), made._version, frozenset(layers))
        return out

    def _first_reader(self, product: Product, name: str) -> str:
        key = id(product.X), product.reading
        known = self._inputs.get(key)
        if known is None or known[0]() is not product.X:
            known = self._inputs[key] = weakref.ref(product.X), name
        return known[1]

    def _layers_of(self, x: Tensor) -> frozenset[str]:
        known = self._values.get(id(x))
        return known.layers if known and known.tensor() is x and known.version == x._version else frozenset()


def find_no_layers(block: nn.Module, run: Callable[[], object]) -> frozenset[str]:
    """Names of the matrices of a block that are multiplied with an input and stay dense.

    A matrix decides, and is one of them, if it is called a router; if the forward chooses among its outputs, by `topk`,
    say; if it has one output, which is the weight of a whole vector; if the forward multiplies with it in fp32 whatever
    the model's dtype; or if it reads nothing but the outputs of such matrices.

    So is a matrix that reads several inputs, and shares one of them with others: it has no Gram matrix of its own.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it.
    """
    decisions = _Decisions(block)
    with torch.no_grad(), decisions:
        run()
    routers = more = decisions.found
    while more:
        more = {name for name, read in decisions.readers.items() if read and read <= routers} - routers
        routers = routers | more
    return frozenset(routers | {name for name, first in decisions.first.items() if len(first) > 1})
