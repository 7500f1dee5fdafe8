"""Parameters that are used at several depths of the model: by several blocks, or by one that runs more than once."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from sparsefw.errors import InputError
from sparsefw.model.slots import addresses, slots_of


@dataclass(frozen=True)
class SharedParameters:
    """Parameters of blocks that stay dense, by their names in the model: they have inputs of several depths.

    Attributes:
        names: those that are one tensor with another parameter, or lie in the same memory, with that one, and those of
            repeated blocks.
        sources: for each parameter that the checkpoint has no tensor for, the parameter whose tensor it is.
        repeated: names of the blocks that run more than once in a forward.
    """

    names: frozenset[str]
    sources: dict[str, str]
    repeated: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the user should know, one line each."""
        inside = tuple(f"{block}." for block in self.repeated)
        between = sorted(name for name in self.names if not name.startswith(inside))
        notes = [f"stay dense: {len(between)} parameters that blocks share, {between[0]} first"] if between else []
        if self.repeated:
            count, first = len(self.repeated), self.repeated[0]
            notes.append(f"stay dense: {count} blocks that run more than once in a forward, {first} first")
        return notes

    def places(self, parameter: str) -> list[str]:
        """The parameters that the tensor of a parameter becomes."""
        return [parameter, *(name for name, source in self.sources.items() if source == parameter)]


def shared_parameters(
    model: nn.Module, blocks: Iterable[str], tied: dict[str, str], stored: Collection[str]
) -> SharedParameters:
    """The parameters that blocks share with each other, or with the rest of the model.

    Args:
        model: the model, whose parameters may be on the meta device.
        blocks: names of the blocks, in the order of their calls.
        tied: for each parameter that is tied to another one, the name of that one.
        stored: names of the parameters that the checkpoint has tensors for.

    Raises:
        InputError: a parameter outside of the blocks is one tensor with a block's, and is not in the checkpoint.
    """
    calls = Counter(blocks)
    inside, repeated = tuple(f"{block}." for block in calls), tuple(block for block, n in calls.items() if n > 1)
    parameters = _named(model, calls)
    names = {name for name, _ in parameters if name.startswith(tuple(f"{block}." for block in repeated))}
    sources: dict[str, str] = {}
    for group in _groups(parameters, tied):
        if not any(name.startswith(inside) for name in group):
            continue
        names.update(group)
        source = next((name for name in group if name in stored), group[0])
        for name in group:
            if name in stored or name == source:
                continue
            if not name.startswith(inside):
                raise InputError(f"{name}: unsupported model {type(model).__name__}: it is one tensor with {source}")
            sources[name] = source
    return SharedParameters(frozenset(names), sources, repeated)


def _named(model: nn.Module, blocks: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """All parameters with all their names, those inside a block as the block names them.

    A block that is a wrapper may name its parameters otherwise than the model does, and layers have the block's names.
    """
    slots = slots_of(model.named_modules(remove_duplicate=False))
    parameters = {slot.path: slot.own for slot in slots if isinstance(slot.own, nn.Parameter)}
    for block in blocks:
        module = model.get_submodule(block)
        own = {f"{block}.{name}": x for name, x in module.named_parameters(remove_duplicate=False)}
        for slot in slots_of(module.named_modules(prefix=block, remove_duplicate=False)):
            if slot.path not in own:
                parameters.pop(slot.path, None)
        parameters |= own
    return [*parameters.items()]


def _groups(parameters: list[tuple[str, nn.Parameter]], tied: dict[str, str]) -> list[list[str]]:
    """Names of parameters that are one tensor, or lie in the same memory, those of a tensor together."""
    first: dict[int, str] = {}
    pairs = list(tied.items())
    for name, parameter in parameters:
        if (other := first.setdefault(id(parameter), name)) != name:
            pairs.append((name, other))
    pairs += _in_common({name: parameter for name, parameter in parameters if first[id(parameter)] == name})
    groups: dict[str, list[str]] = {}
    for name, other in pairs:
        one, two = groups.get(name, [name]), groups.get(other, [other])
        if one is not two:
            two += one
            groups |= dict.fromkeys(two, two)
    return list({id(group): group for group in groups.values()}.values())


def _in_common(parameters: dict[str, nn.Parameter]) -> list[tuple[str, str]]:
    """Pairs of parameters that lie in the same memory. Parts of one storage that lie apart are not the same."""
    # Tensors without data have no address.
    placed = [(name, x) for name, x in parameters.items() if not x.is_meta and x.numel() and x.data_ptr()]
    ranges = sorted((str(x.device), *addresses(x), name) for name, x in placed)
    pairs, last = [], ("", 0, "")
    for device, start, end, name in ranges:
        if device == last[0] and start < last[1]:
            pairs.append((name, last[2]))
        last = max(last, (device, end, name))
    return pairs
