"""The experts of a mixture: which of a block's numbered modules they are.

Experts, and parts that every token goes through one after the other, both are numbered modules that are alike. A
mixture chooses its experts, and all read what was there before the choice. Parts in turn read what the part before them
has returned: the two attentions of a block of LongCat-Flash, say, or the blocks of a stage of Swin.
"""

from torch import Tensor, nn

from sparsefw.model.layers.block_tape import BlockTape
from sparsefw.model.tape import Op, Value

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


def _modules_read(tape: BlockTape) -> dict[str, frozenset[str]]:
    """By name of a module that was called, those modules whose outputs its input was made of.

    Outputs are followed as long as all entries of them go on. A function that is given integers or booleans may choose
    among the entries, and so may one that writes to a part of a tensor: what it makes is not followed.
    """
    read: dict[str, frozenset[str]] = {}
    sources: dict[Value, frozenset[str]] = {}

    def sources_of(values: tuple[Value, ...]) -> frozenset[str]:
        return _NOTHING.union(*(sources.get(value, _NOTHING) for value in values))

    calls = iter(tape.modules)
    call = next(calls, None)
    for number in range(1, len(tape.ops) + 2):
        while call and call.before == number:
            if call.read:
                read[call.module] = read.get(call.module, _NOTHING) | sources_of(call.read)
            for value in call.returned:
                sources[value] = sources_of((value,)) | {call.module}
            call = next(calls, None)
        if number <= len(tape.ops):
            op = tape.ops[number - 1]
            followed = sources_of(op.inputs) if _keeps_all(op) else _NOTHING
            for value in op.made:
                sources[value] = sources_of((value,)) | followed
            for before, after in op.written:
                sources[after] |= sources_of((before,))
    return read


def _keeps_all(op: Op) -> bool:
    """Whether all entries of what a function is given go on in what it makes."""
    return op.function is not Tensor.__setitem__ and all(x.dtype.is_floating_point for x in op.inputs)
