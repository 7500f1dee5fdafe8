"""What is special in a mixture: which of a block's numbered modules are experts, and which matrices are no layers.

Experts, and parts that every token goes through one after the other, both are numbered modules that are alike. A
mixture chooses its experts, and all read what was there before the choice. Parts in turn read what the part before them
has returned: the two attentions of a block of LongCat-Flash, say, or the blocks of a stage of Swin.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers import MIXING, BlockTape, Reading
from sparsefw.model.tape import Op, Value, name_of

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


def experts_of(block: nn.Module) -> frozenset[str]:
    """Names of the modules in a block that look like experts: numbered, and one of several that are alike.

    Modules are alike if their parameters have the same names. Those of an `nn.Sequential` are no experts: every token
    goes through all of them. Nor are parts of a block that are just numbered, as the attention and the MLP of T5. Parts
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
    """Those of `experts_of` that are no parts in turn.

    The modules of a list are parts in turn if all are called, and all but one read what others have returned.

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


def _modules_read(tape: BlockTape) -> dict[str, Set[str]]:
    """By name of a module that was called, those modules whose outputs its input was made of.

    Outputs are followed as long as all entries of them go on. A function that is given integers or booleans may choose
    among the entries, and so may one that writes to a part of a tensor: what it makes is not followed.
    """
    made_of: dict[Value, Set[str]] = {}
    for name, _, values in tape.modules:
        made_of |= {value: made_of.get(value, _NOTHING) | {name} for value in values}

    def sources(values: Iterable[Value]) -> Set[str]:
        return _NOTHING.union(*(made_of.get(x, _NOTHING) for x in values))

    for op in tape.ops:
        keeps_all = op.function is not Tensor.__setitem__ and all(x.dtype.is_floating_point for x in op.inputs)
        followed = sources(op.inputs) if keeps_all else _NOTHING
        made_of |= {value: made_of.get(value, _NOTHING) | followed for value in op.made}
        made_of |= {after: made_of[after] | sources([before]) for before, after in op.written}
    read: dict[str, Set[str]] = {}
    for name, values, _ in tape.modules:
        # A module may write to what it is given, and return that.
        read[name] = read.get(name, _NOTHING) | (sources(values) - {name})
    return read


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
            name = product.layer.name
            readers.setdefault(name, set()).update(layers.get(product.X, _NOTHING))
            first.setdefault(name, set()).add(first_reader.setdefault((product.X, product.reading), name))
            if "router" in name or product.layer.weight.shape[0] == 1:
                chosen.add(name)
        multiplied = frozenset(product.layer.name for product in products)
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
