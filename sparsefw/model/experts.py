"""Find the experts of a mixture among the numbered modules of a block, and the matrices that are no layers.

Experts are numbered modules that are alike, and so are parts that every token goes through in turn: the two attentions
of a block of LongCat-Flash, say, or the blocks of a stage of Swin. All experts read what was there before the mixture
has chosen among them. Parts in turn read what the part before them has returned.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.find_layers import MIXING, BlockTape, Reading
from sparsefw.model.tape import Op, TapeValue, name_of

# Names of functions that choose among the entries of a tensor.
_CHOOSING = {"topk", "argmax", "argmin", "sort", "argsort", "msort", "kthvalue", "multinomial"}

# Names of functions that choose if their indices are read.
_EXTREMES = {"max", "min"}

# Names of functions that take the entries at some indices, with the position of the axis among their arguments.
_TAKING = {"gather": 1, "take_along_dim": 2}

# Names of functions that cut a tensor into parts. Others that change the number of entries add them up, or combine them
# with other tensors.
_CUTTING = {"__getitem__", "chunk", "split", "narrow", "unbind", "select", "tensor_split", "split_with_sizes"}

# Names of functions that raise a weight to fp32 whatever the precision of the model.
_RAISING = {"float", "double", "type"}

_NOTHING: frozenset[str] = frozenset()


def experts_of(block: nn.Module) -> frozenset[str]:
    """Names of the modules in a block that look like experts: numbered, and one of several that are alike.

    Modules are alike if their parameters have the same names. Modules of an `nn.Sequential` are no experts: every token
    goes through all of them. Nor are numbered parts of a block that differ, as the attention and the MLP of T5. Parts
    that are alike may still be no experts: what they read shows it, see `without_parts_in_turn`.
    """
    experts: set[str] = set()
    for name, module in block.named_modules():
        if type(module).forward is nn.Sequential.forward:
            continue
        alike: dict[tuple[str, ...], list[str]] = {}
        for index, child in module.named_children():
            parameters = tuple(key for key, _ in child.named_parameters(remove_duplicate=False))
            if index.isdecimal() and parameters:
                alike.setdefault(parameters, []).append(f"{name}.{index}".lstrip("."))
        experts.update(child for children in alike.values() if len(children) > 1 for child in children)
    return frozenset(experts)


def without_parts_in_turn(experts: frozenset[str], tape: BlockTape) -> frozenset[str]:
    """Leave out of `experts_of` the parts that every token goes through in turn.

    The modules of a list are such parts if all are called, and all but one read outputs of others.

    Args:
        experts: names of modules.
        tape: a forward, with the calls of these modules.
    """
    read = _modules_read(tape)
    lists: dict[str, set[str]] = {}
    for name in experts:
        lists.setdefault(name.rpartition(".")[0], set()).add(name)
    in_turn = (
        names
        for names in lists.values()
        if names <= read.keys() and sum(names.isdisjoint(read[name]) for name in names) == 1
    )
    return experts.difference(*in_turn)


class _Origins(dict[TapeValue, frozenset[str]]):
    """Names of the modules or matrices that values are made of."""

    def of(self, values: Iterable[Any]) -> frozenset[str]:
        """The names of all these values together."""
        return _NOTHING.union(*(self.get(x, _NOTHING) for x in values))


def _modules_read(tape: BlockTape) -> dict[str, frozenset[str]]:
    """By name of a module that was called, the modules whose outputs its input was made of.

    Outputs are followed as long as all entries of them go on. A function that is given integers or booleans may choose
    among the entries, and so may one that writes to a part of a tensor: their results are not followed.
    """
    origins = _Origins()
    for name, _, values in tape.modules:
        origins |= {value: origins.of([value]) | {name} for value in values}
    for op in tape.ops:
        keeps_all = op.function is not Tensor.__setitem__ and all(x.dtype.is_floating_point for x in op.inputs)
        followed = origins.of(op.inputs) if keeps_all else _NOTHING
        origins |= {value: origins.of([value]) | followed for value in op.made}
        origins |= {after: origins.of([after, before]) for before, after in op.written}
    read: dict[str, frozenset[str]] = {}
    for name, values, _ in tape.modules:
        # A module may write to its argument, and return that.
        read[name] = read.get(name, _NOTHING) | (origins.of(values) - {name})
    return read


@dataclass
class _Use:
    """The use of a matrix in a forward.

    Attributes:
        reads: the matrices whose outputs it reads, entry by entry.
        leads_to: the matrices that its outputs go into next; None among them: something else.
        first: the first matrices that read what it reads.
        decides: whether the forward decides by its outputs.
    """

    reads: set[str | None] = field(default_factory=set)
    leads_to: set[str | None] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    decides: bool = False


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
    uses: dict[str, _Use] = defaultdict(_Use)
    raised: set[str] = set()
    # By value, without another product in between: the matrices of which each entry follows from one output, those of
    # which any entry follows, and those of whose largest or smallest outputs it has the indices.
    by_entry, by_any, indices = _Origins(), _Origins(), _Origins()
    first_reader: dict[tuple[TapeValue, Reading], str] = {}
    for op in tape.ops:
        if op.name in _RAISING and op.inputs and (weight := op.inputs[0].tensor) is not None:
            raised.update(filter(None, [tape.names.locate(weight)[0]]))
        for name in indices.of(op.inputs) | (by_entry.of(op.inputs) if _chooses(op) else _NOTHING):
            uses[name].decides = True
        products = tape.products.get(op.number, ())
        for product in products:
            name, use = product.layer.name, uses[product.layer.name]
            use.reads.update(by_entry.of([product.X]))
            use.first.add(first_reader.setdefault((product.X, product.reading), name))
            use.decides |= "router" in name or product.layer.weight.shape[0] == 1
        multiplied = frozenset(product.layer.name for product in products)
        follows = by_any.of(op.inputs)
        if op.name in _EXTREMES and isinstance(op.out, tuple):
            indices[op.outputs[1]] = by_entry.of(op.inputs[:1])
        if op.name in MIXING:
            for name in follows:
                uses[name].leads_to.update(multiplied or {None})
        for made in op.made:
            if op.name in MIXING:
                by_entry[made] = by_any[made] = multiplied
            else:
                size = made.shape.numel()
                by_entry[made] = by_entry.of(x for x in op.inputs if op.name in _CUTTING or x.shape.numel() == size)
                by_any[made] = follows
    for name in by_any.of([tape.output]):
        uses[name].leads_to.add(None)
    chosen = {name for name, use in uses.items() if use.decides}
    chosen = _closed(chosen, {name: use.leads_to for name, use in uses.items()})
    routers = _closed(chosen | raised, {name: use.reads for name, use in uses.items()})
    return frozenset(routers | {name for name, use in uses.items() if len(use.first) > 1})


def choose_all_over(func: Any, args: tuple, kwargs: dict) -> Any:
    """Make a call of a torch function; if it chooses among entries, let each token choose others.

    The layers that are found must not depend on the experts that a few tokens happen to be sent to. These may have no
    weights, so that no layer of an expert is seen. Where all weights are zero, all tokens would be sent to the same
    experts. Here the first token prefers the first entries, the last token the last ones. Use it in `Calls` outside of
    all other modes.
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
        return bool(op.args) and axis in (-1, len(op.args[0].shape) - 1)
    return op.name in _CHOOSING


def _closed(names: set[str], related: Mapping[str, Set[str | None]]) -> set[str]:
    """Add to names all those that are related to nothing but such names, directly or by others."""
    found = more = names
    while more:
        more = {name for name, others in related.items() if others and others <= found} - found
        found = found | more
    return found
