"""Find the matrices that are multiplied with an input and stay dense.

Most of them decide what a block does: routers, and gates of a single number. They are small, and much depends on them.
They are known by what the forward does with them. A name tells only of routers that mix streams and choose nothing.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from sparsefw.model.layers.block_tape import BlockTape
from sparsefw.model.layers.products import MIXING, Reading
from sparsefw.model.tape import Op, Value, name_of

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

_NOTHING: frozenset[str] = frozenset()


def find_no_layers(tape: BlockTape) -> frozenset[str]:
    """Names of the matrices of a block that are multiplied with an input and stay dense.

    A matrix decides, and is one of them, if

    - the forward chooses among its outputs, by `topk`, say, or takes some of them by their indices;
    - it has one output, which is the weight of a whole vector;
    - it is called a router;
    - all that its outputs go into are such matrices: it is an inner layer of a router;
    - the forward multiplies with it in fp32 whatever the model's dtype;
    - it reads nothing but the outputs of such matrices.

    So is a matrix that reads several inputs, and shares one of them with others: it has no Gram matrix of its own.
    """
    # By value: the matrices of which each entry follows from one output, and all of which any entry follows, without
    # another product in between.
    layers: dict[Value, frozenset[str]] = {}
    origins: dict[Value, frozenset[str]] = {}
    # Indices of the largest or smallest outputs of matrices.
    indices: dict[Value, frozenset[str]] = {}
    chosen: set[str] = set()
    raised: set[str] = set()
    # By matrix: those whose outputs it reads, entry by entry; what its outputs go into next, None for anything else;
    # the first ones that read what it reads.
    readers: dict[str, set[str]] = {}
    leads_to: dict[str, set[str | None]] = {}
    first: dict[str, set[str]] = {}
    first_reader: dict[tuple[Any, Reading], str] = {}
    for op in tape.ops:
        if op.name in _RAISING and op.inputs and (weight := op.inputs[0].tensor) is not None:
            raised.update(filter(None, [tape.names.locate(weight)[0]]))
        if _chooses(op):
            chosen.update(*(layers.get(x, _NOTHING) for x in op.inputs))
        chosen.update(*(indices.get(x, _NOTHING) for x in op.inputs))
        products = tape.products.get(op.number, ())
        for product in products:
            name = product.layer
            readers.setdefault(name, set()).update(layers.get(product.X, _NOTHING))
            first.setdefault(name, set()).add(first_reader.setdefault((product.X, product.reading), name))
            if _ROUTER.search(name) or product.weight.shape[0] == 1:
                chosen.add(name)
        multiplied = frozenset(product.layer for product in products)
        follows = _NOTHING.union(*(origins.get(x, _NOTHING) for x in op.inputs))
        if op.name in _EXTREMES and isinstance(op.out, tuple):
            indices[op.outputs[1]] = layers.get(op.inputs[0], _NOTHING)
        if op.name in MIXING:
            for origin in follows:
                leads_to.setdefault(origin, set()).update(multiplied or {None})
        for made in op.made:
            if op.name in MIXING:
                layers[made] = origins[made] = multiplied
            else:
                same = [x for x in op.inputs if op.name in _CUTTING or x.numel() == made.numel()]
                layers[made] = _NOTHING.union(*(layers.get(x, _NOTHING) for x in same))
                origins[made] = follows
    for origin in origins.get(tape.output, _NOTHING):
        leads_to.setdefault(origin, set()).add(None)
    routers = _closed(_closed(chosen, leads_to) | raised, readers)
    return frozenset(routers | {name for name, names in first.items() if len(names) > 1})


def choose_all_over(func: Any, args: tuple, kwargs: dict) -> Any:
    """Make a call of a torch function; one that chooses among entries chooses others for each token.

    What is found of a block must not depend on which experts a few tokens happen to be sent to: those without weights,
    perhaps, so that no layer of an expert is seen. Where all weights are zero, all tokens would be sent to the same
    ones. The first token prefers the first entries here, the last token the last ones, and those between them others in
    between. For `Calls` outside of all that look at a forward.
    """
    function = name_of(func)
    along = "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int))
    if args and (function in _CHOOSING or (function in _EXTREMES and along)):
        scores = args[0]
        if isinstance(scores, Tensor) and scores.is_floating_point() and scores.dim() and scores.numel():
            entries = scores.shape[-1]
            tokens, places = (torch.linspace(0, 1, n) for n in (scores.numel() // entries, entries))
            distances = (tokens[:, None] - places).abs().view(scores.shape)
            # Far more than scores differ by, and less than what masks take from them.
            args = (scores - 100 * distances.to(scores), *args[1:])
    return func(*args, **kwargs)


def _chooses(op: Op) -> bool:
    """Whether a call chooses among the entries of a tensor, or takes those on its last axis that indices name."""
    if op.name in _TAKING:
        at = _TAKING[op.name]
        axis = op.args[at] if len(op.args) > at else op.kwargs.get("dim")
        return bool(op.args) and axis in (-1, op.args[0].dim() - 1)
    return op.name in _CHOOSING


def _closed(names: set[str], related: Mapping[str, Set[str | None]]) -> set[str]:
    """Names, with all those that are related to nothing but such names, whether directly or by others."""
    found = more = names
    while more:
        more = {name for name, others in related.items() if others and others <= found} - found
        found = found | more
    return found
