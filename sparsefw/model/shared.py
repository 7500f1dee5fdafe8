"""Parameters that several blocks share: one tensor, used at several depths of the model."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from sparsefw.errors import InputError


@dataclass(frozen=True)
class SharedParameters:
    """Parameters of blocks that are one tensor with another parameter, by their names in the model.

    Attributes:
        names: all of them, with those other parameters.
        sources: for each parameter that the checkpoint has no tensor for, the parameter whose tensor it is.
    """

    names: frozenset[str]
    sources: dict[str, str]

    def places(self, parameter: str) -> list[str]:
        """The parameters that the tensor of a parameter becomes."""
        return [parameter, *(name for name, source in self.sources.items() if source == parameter)]


def shared_parameters(
    model: nn.Module, blocks: Iterable[str], tied: dict[str, str], stored: Collection[str]
) -> SharedParameters:
    """The parameters that blocks share with each other, or with the rest of the model.

    Args:
        model: the model, whose parameters may be on the meta device.
        blocks: names of the blocks.
        tied: for each parameter that is tied to another one, the name of that one.
        stored: names of the parameters that the checkpoint has tensors for.

    Raises:
        InputError: a parameter outside of the blocks is one tensor with a block's, and is not in the checkpoint.
    """
    inside = tuple(f"{block}." for block in blocks)
    names: set[str] = set()
    sources: dict[str, str] = {}
    for group in _groups(model, tied):
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
    return SharedParameters(frozenset(names), sources)


def _groups(model: nn.Module, tied: dict[str, str]) -> list[list[str]]:
    """Names of parameters that are one tensor, those of a tensor together."""
    first: dict[int, str] = {}
    pairs = list(tied.items())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name:
            pairs.append((name, other))
    groups: dict[str, list[str]] = {}
    for name, other in pairs:
        one, two = groups.get(name, [name]), groups.get(other, [other])
        if one is not two:
            two += one
            groups |= dict.fromkeys(two, two)
    return list({id(group): group for group in groups.values()}.values())
