r"""Which layers are pruned: `--include` and `--ignore`.

down_proj, layers.0, model.layers.3.mlp    layers that have it as whole parts of their dotted name
re:.*layers\.(0|1)\.                       layers whose name the regular expression matches from its start
"""

import re
from collections.abc import Iterable

from sparsefw.errors import InputError, first_line, shown

REGEX = "re:"

# The index of an expert that is a slice of a stacked parameter.
_INDEX = re.compile(r"\[\d+\]$")


def matches(pattern: str, layer: str) -> bool:
    """Whether a pattern stands for a layer.

    Args:
        pattern: a name or re:PATTERN, see above.
        layer: the layer's name, in which `.weight` at the end does not count. An expert that is a slice of a stacked
            parameter has its index at the end, `experts.down_proj[3]`; plain names match with it and without it.
    """
    name = layer.removesuffix(".weight")
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    part = f".{pattern.removesuffix('.weight')}."
    return part in f".{name}." or part in f".{without_index(name)}."


def without_index(layer: str) -> str:
    """The name of the parameter that a layer is, or is a slice of."""
    return _INDEX.sub("", layer)


def selected(layer: str, include: Iterable[str], ignore: Iterable[str]) -> bool:
    """Whether a layer is pruned: one of `include`, where that names any, and none of `ignore`."""
    include = tuple(include)
    if include and not any(matches(pattern, layer) for pattern in include):
        return False
    return not any(matches(pattern, layer) for pattern in ignore)


def check_patterns(flag: str, patterns: Iterable[str]) -> None:
    """Raise InputError if a pattern is empty or no regular expression."""
    for pattern in patterns:
        if not pattern.removeprefix(REGEX):
            raise InputError(f"{flag}: empty; give the name of a layer or block, or {REGEX}PATTERN")
        if pattern.startswith(REGEX):
            try:
                re.compile(pattern.removeprefix(REGEX))
            # The others are those of repetitions and nesting beyond what Python can compile.
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(f"{flag} {shown(pattern)}: not a regular expression ({first_line(error)})") from error


def check_used(layers: Iterable[str], include: Iterable[str], ignore: Iterable[str]) -> None:
    """Refuse patterns that match no layer, and selections without a layer.

    Args:
        layers: names of all prunable layers of the model.
        include, ignore: patterns of layers, see above.

    Raises:
        InputError: a pattern matches no layer, or no layer is selected.
    """
    layers, include, ignore = list(layers), tuple(include), tuple(ignore)
    for flag, patterns in (("--include", include), ("--ignore", ignore)):
        for pattern in patterns:
            if not any(matches(pattern, layer) for layer in layers):
                example = f"; one is {layers[0]}" if layers else ""
                raise InputError(f"{flag} {pattern}: no layer of the model has this name{example}")
    if not any(selected(layer, include, ignore) for layer in layers):
        raise InputError("--include, --ignore: no layer is left to prune")
