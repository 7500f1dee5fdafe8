"""Find the experts in a block with a mixture of experts, and the matrices that stay dense, such as routers.

Experts are numbered modules that are alike. But so are modules that run one after the other on every token (sequential
parts): the two attentions in a block of LongCat-Flash, or the blocks in a stage of Swin. The inputs tell them apart.
All experts read the mixture's input, and a sequential part reads the output of the part before it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.find_layers import MIXING, BlockTape, Reading
from sparsefw.model.layers import Experts
from sparsefw.model.tape import Op, TapeValue, name_of

# Names of functions that choose among the entries of a tensor.
_CHOOSING = {"topk", "argmax", "argmin", "sort", "argsort", "msort", "kthvalue", "multinomial"}

# Names of functions that return values and indices. They count as choosing if a later call reads the indices.
_EXTREMES = {"max", "min"}

# Names of functions that gather entries by index, and the position of the axis among their arguments.
_TAKING = {"gather": 1, "take_along_dim": 2}

# Names of functions that cut a tensor into parts. All other functions that change the number of entries combine several
# entries into one.
_CUTTING = {"__getitem__", "chunk", "split", "narrow", "unbind", "select", "tensor_split", "split_with_sizes"}

# Names of functions that convert a weight to fp32, whatever the dtype of the model.
_RAISING = {"float", "double", "type"}

_NOTHING: frozenset[str] = frozenset()


def experts_of(block: nn.Module) -> Experts:
    """Names of the modules in a block that look like experts: numbered modules that are alike.

    Modules are alike if their parameters have the same names. So the attention and the MLP of T5, which are numbered,
    are no experts. Modules of an `nn.Sequential` are no experts either: every token goes through all of them.
    `without_sequential_parts` then removes other modules that are alike and no experts.
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


def without_sequential_parts(experts: Experts, tape: BlockTape) -> Experts:
    """Remove sequential parts from the names of modules that look like experts.

    The modules of a list are sequential parts if all are called, and all but one read outputs of modules in the list.

    Args:
        experts: names of modules, from `experts_of`.
        tape: a recorded forward with the calls of these modules.
    """
    read = _modules_read(tape)
    lists: dict[str, set[str]] = {}
    for name in experts:
        lists.setdefault(name.rpartition(".")[0], set()).add(name)
    sequential = (
        names
        for names in lists.values()
        if names <= read.keys() and sum(names.isdisjoint(read[name]) for name in names) == 1
    )
    return experts.difference(*sequential)


class _Origins(dict[TapeValue, frozenset[str]]):
    """Maps a value to the names of the modules or matrices whose outputs it is computed from."""

    def of(self, values: Iterable[Any]) -> frozenset[str]:
        """The union of the names of these values."""
        return _NOTHING.union(*(self.get(x, _NOTHING) for x in values))


def _modules_read(tape: BlockTape) -> dict[str, frozenset[str]]:
    """Map each called module to the modules whose outputs its input is computed from.

    An output is followed through functions that use all its entries. A function with integers or booleans among its
    inputs may choose among the entries, and so may a write to a part of a tensor. Their results are not followed.
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
        # A module that writes to its argument and returns it does not count as reading its own output.
        read[name] = read.get(name, _NOTHING) | (origins.of(values) - {name})
    return read


@dataclass
class _Use:
    """The use of a matrix in a forward.

    Attributes:
        reads: names of the matrices whose outputs the input is made from, entry by entry.
        leads_to: names of the matrices that the outputs are multiplied with next; None stands for any other use.
        first: for each input of the matrix, the name of the first matrix that reads this input.
        decides: whether one of the first three conditions of `find_no_layers` holds.
    """

    reads: set[str | None] = field(default_factory=set)
    leads_to: set[str | None] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    decides: bool = False


def find_no_layers(tape: BlockTape) -> frozenset[str]:
    """Names of the block's matrices that are multiplied with an input and still stay dense.

    A matrix stays dense as part of a router if

    - the forward chooses among its outputs, for example by `topk`, or gathers some outputs by index;
    - it has a single output, which scales a whole vector;
    - its name contains "router";
    - all its outputs go into matrices of a router;
    - the forward multiplies with it in fp32 whatever the model's dtype;
    - it reads only outputs of matrices of a router.

    A matrix also stays dense if it reads several inputs and shares one of them with another matrix, since it has no
    single Gram matrix.
    """
    uses: dict[str, _Use] = defaultdict(_Use)
    raised: set[str] = set()
    # The matrices that a value comes from, without another product in between. `by_entry`: each entry of the value
    # comes from one output of the matrix. `by_any`: some entry depends on outputs. `indices`: the value holds the
    # indices of the largest or smallest outputs.
    by_entry, by_any, indices = _Origins(), _Origins(), _Origins()
    first_reader: dict[tuple[TapeValue, Reading], str] = {}
    for op in tape.ops:
        if op.name in _RAISING and op.inputs and (weight := op.inputs[0].tensor) is not None:
            raised.update(filter(None, [tape.names.locate(weight)[0]]))
        for name in indices.of(op.inputs) | (by_entry.of(op.inputs) if _chooses(op) else _NOTHING):
            uses[name].decides = True
        products = tape.products[op.number]
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
    """Call a torch function. If it chooses among entries, change the scores so that the tokens choose different ones.

    A forward on a few tokens should reach as many experts as possible, since only the layers of reached experts are
    found. On weights that are all zero, every token would be sent to the same experts. Here the first token prefers the
    first entries, and the last token the last entries. Use this in the outermost `Calls`.
    """
    function = name_of(func)
    along = "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int))
    if args and (function in _CHOOSING or (function in _EXTREMES and along)):
        scores = args[0]
        if isinstance(scores, Tensor) and scores.is_floating_point() and scores.dim() and scores.numel():
            entries = scores.shape[-1]
            tokens, places = (torch.linspace(0, 1, n) for n in (scores.numel() // entries, entries))
            distances = (tokens[:, None] - places).abs().view(scores.shape)
            # 100 is far more than the differences between scores, and less than masks subtract from scores.
            args = (scores - 100 * distances.to(scores), *args[1:])
    return func(*args, **kwargs)


def _chooses(op: Op) -> bool:
    """Whether a call chooses among the entries of a tensor, or gathers entries by index along the last axis."""
    if op.name in _TAKING:
        at = _TAKING[op.name]
        axis = op.args[at] if len(op.args) > at else op.kwargs.get("dim")
        return bool(op.args) and axis in (-1, len(op.args[0].shape) - 1)
    return op.name in _CHOOSING


def _closed(names: set[str], related: Mapping[str, Set[str | None]]) -> set[str]:
    """Add names to a set until no other name is related only to names in the set."""
    found = more = names
    while more:
        more = {name for name, others in related.items() if others and others <= found} - found
        found = found | more
    return found
