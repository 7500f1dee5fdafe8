"""Find the matrices that are multiplied with an input and stay dense.

Most of them decide what a block does: routers, and gates of a single number. They are small, and much depends on them.
They are known by what the forward does with them. A name tells only of routers that mix streams and choose nothing.
"""

import re
import weakref
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.model.layers.names import WeightNames
from sparsefw.model.layers.products import MIXING, Product, Reading, products_of
from sparsefw.model.operands import tensors_in
from sparsefw.model.stand_ins import hidden_of

_ROUTER = re.compile("router")

# Functions that choose among the entries of a tensor, by name.
_CHOOSING = {"topk", "argmax", "argmin", "sort", "argsort", "msort", "kthvalue", "multinomial"}

# Functions that choose if their indices are read, by name.
_EXTREMES = {"max", "min"}

# Functions that take the entries that indices name, by name: the position of the axis among their arguments.
_TAKING = {"gather": 1, "take_along_dim": 2}

# Functions that cut a tensor into parts, by name. Others that change the number of entries add them up, or combine them
# with other tensors.
_CUTTING = {"__getitem__", "chunk", "split", "narrow", "unbind", "select", "tensor_split", "split_with_sizes"}

# Functions that raise a weight to fp32 whatever the precision of the model, by name.
_RAISING = {"float", "double", "type"}


@dataclass(frozen=True)
class _Values:
    """A tensor that follows from the outputs of matrices, without another product in between.

    Attributes:
        tensor: the tensor.
        version: how often it had been written to.
        layers: names of the matrices of which each entry follows from one output.
        origins: names of all these matrices, whichever of their outputs an entry follows from.
    """

    tensor: weakref.ref[Tensor]
    version: int
    layers: frozenset[str]
    origins: frozenset[str]


_NOTHING: frozenset[str] = frozenset()


class _Decisions(TorchFunctionMode):
    """Follows the outputs of all matrices through a block's forward.

    Attributes:
        chosen: names of the matrices that decide something by themselves.
        raised: names of the matrices that the forward multiplies with in fp32 whatever the model's dtype.
        readers: by name of a matrix, the matrices whose outputs it reads, entry by entry.
        leads_to: by name of a matrix, what its outputs go into next: matrices, and None for anything else.
        first: by name of a matrix, the first matrices that read what it reads.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._names = WeightNames(block)
        self._values: dict[int, _Values] = {}
        self.chosen: set[str] = set()
        self.raised: set[str] = set()
        self.readers: dict[str, set[str]] = {}
        self.leads_to: dict[str, set[str | None]] = {}
        self.first: dict[str, set[str]] = {}
        self._inputs: dict[tuple[int, Reading], tuple[weakref.ref[Tensor], str]] = {}
        # By a tensor's id: indices of the largest or smallest outputs of matrices, and the matrices.
        self._indices: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, function = kwargs or {}, getattr(func, "__name__", str(func))
        operands = tensors_in((args, kwargs))
        followed = [(x, self._layers_of(x)) for x in operands]
        origins = _NOTHING.union(*(self._origins_of(x) for x in operands))
        versions = [x._version for x in operands]
        if function in _RAISING and operands and (name := self._names.find(operands[0])):
            self.raised.add(name)
        if _chooses(function, args, kwargs):
            self.chosen.update(*(layers for _, layers in followed))
        for x in operands:
            known = self._indices.get(id(x))
            if known and known[0]() is x:
                self.chosen |= known[1]
        multiplied = self._see_products(func, args, kwargs)
        out = func(*args, **kwargs)
        if function in _EXTREMES and isinstance(out, tuple):
            self._indices[id(out[1])] = weakref.ref(out[1]), followed[0][1]
        if function in MIXING:
            for origin in origins:
                self.leads_to.setdefault(origin, set()).update(multiplied or {None})
        written = [x for x, version in zip(operands, versions, strict=True) if x._version != version]
        written += [x._base for x in written if x._base is not None]
        for made in [*tensors_in(out), *written]:
            if function in MIXING:
                layers = origins = frozenset(multiplied)
            else:
                same = function in _CUTTING
                layers = _NOTHING.union(*(names for x, names in followed if same or x.numel() == made.numel()))
            if origins:
                self._values[id(made)] = _Values(weakref.ref(made), made._version, layers, origins)
        return out

    def end(self, hidden: Tensor) -> None:
        """Note the hidden states that leave the block."""
        for origin in self._origins_of(hidden):
            self.leads_to.setdefault(origin, set()).add(None)

    def _see_products(self, func: Any, args: tuple, kwargs: dict) -> set[str]:
        """Note the products of a call; returns the names of their matrices."""
        multiplied = set()
        for product in products_of(func, args, kwargs, self._names.is_weight):
            if name := self._names.find(product.weight):
                multiplied.add(name)
                self.readers.setdefault(name, set()).update(self._layers_of(product.X))
                self.first.setdefault(name, set()).add(self._first_reader(product, name))
                if _ROUTER.search(name) or product.weight.shape[0] == 1:
                    self.chosen.add(name)
        return multiplied

    def _first_reader(self, product: Product, name: str) -> str:
        key = id(product.X), product.reading
        known = self._inputs.get(key)
        if known is None or known[0]() is not product.X:
            known = self._inputs[key] = weakref.ref(product.X), name
        return known[1]

    def _layers_of(self, x: Tensor) -> frozenset[str]:
        known = self._known(x)
        return known.layers if known else _NOTHING

    def _origins_of(self, x: Tensor) -> frozenset[str]:
        known = self._known(x)
        return known.origins if known else _NOTHING

    def _known(self, x: Tensor) -> _Values | None:
        known = self._values.get(id(x))
        return known if known and known.tensor() is x and known.version == x._version else None


class ArbitraryChoices(TorchFunctionMode):
    """Lets a forward choose among entries by random numbers, the same in every run.

    Where all weights are zero, all scores are equal, and every token would choose the same entries: those of experts
    without weights, perhaps, so that no layer of an expert is seen. Enter it before all modes that watch the forward.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, function = kwargs or {}, getattr(func, "__name__", "")
        along = "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int))
        if args and (function in _CHOOSING or (function in _EXTREMES and along)):
            scores = args[0]
            if isinstance(scores, Tensor) and scores.is_floating_point():
                random = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
                args = (scores + random.to(scores), *args[1:])
        return func(*args, **kwargs)


def _chooses(function: str, args: tuple, kwargs: dict) -> bool:
    """Whether a call chooses among the entries of a tensor, or takes those on its last axis that indices name."""
    if function in _TAKING:
        at = _TAKING[function]
        axis = args[at] if len(args) > at else kwargs.get("dim")
        return bool(args) and axis in (-1, args[0].dim() - 1)
    return function in _CHOOSING


def find_no_layers(block: nn.Module, run: Callable[[], Any]) -> frozenset[str]:
    """Names of the matrices of a block that are multiplied with an input and stay dense.

    A matrix decides, and is one of them, if

    - the forward chooses among its outputs, by `topk`, say, or takes some of them by their indices;
    - it has one output, which is the weight of a whole vector;
    - it is called a router;
    - all that its outputs go into are such matrices: it is an inner layer of a router;
    - the forward multiplies with it in fp32 whatever the model's dtype;
    - it reads nothing but the outputs of such matrices.

    So is a matrix that reads several inputs, and shares one of them with others: it has no Gram matrix of its own.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it, returns what the block does.
    """
    decisions = _Decisions(block)
    with torch.no_grad(), decisions:
        returned = run()
    decisions.end(hidden_of(returned))
    routers = _closed(decisions.chosen, decisions.leads_to)
    routers = _closed(routers | decisions.raised, decisions.readers)
    return frozenset(routers | {name for name, first in decisions.first.items() if len(first) > 1})


def _closed(names: set[str], related: Mapping[str, Set[str | None]]) -> set[str]:
    """Names, with all those that are related to nothing but such names, whether directly or by others."""
    found = more = names
    while more:
        more = {name for name, others in related.items() if others and others <= found} - found
        found = found | more
    return found
