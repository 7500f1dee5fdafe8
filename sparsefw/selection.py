r"""Select layers by patterns of their names: `--include` and `--ignore`.

down_proj, layers.0, model.layers.3.mlp    a name: layers whose dotted name contains it as whole parts
re:.*layers\.(0|1)\.                       a regular expression: layers whose name it matches from the start
"""

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from sparsefw.errors import InputError, first_line, option

REGEX = "re:"

# The index of an expert that is a slice of a stacked parameter.
INDEX = re.compile(r"\[\d+\]$")


def matches(pattern: str, layer: str) -> bool:
    """Tell whether a pattern matches a layer.

    Args:
        pattern: a name or re:PATTERN, see the module.
        layer: the layer's name; `.weight` at its end is ignored. The name of an expert that is a slice of a stacked
            parameter ends with its index, as in `experts.down_proj[3]`. A pattern that is a name matches with the index
            and without it.
    """
    name = layer.removesuffix(".weight")
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    part = f".{pattern.removesuffix('.weight')}."
    return part in f".{name}." or part in f".{without_index(name)}."


def without_index(layer: str) -> str:
    """Return the name of the parameter that holds a layer: the layer's name without the index of an expert."""
    return INDEX.sub("", layer)


def selected(layer: str, include: Collection[str], ignore: Iterable[str]) -> bool:
    """Tell whether a layer is pruned: if `include` is empty or matches it, and `ignore` does not match it."""
    included = not include or any(matches(pattern, layer) for pattern in include)
    return included and not any(matches(pattern, layer) for pattern in ignore)


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raise InputError if a pattern is empty or not a valid regular expression."""
    for pattern in patterns:
        if not pattern.removeprefix(REGEX):
            raise InputError(f"{option(name)}: empty; give the name of a layer or block, or {REGEX}PATTERN")
        if pattern.startswith(REGEX):
            try:
                re.compile(pattern.removeprefix(REGEX))
            # The last two are raised by more repetitions or nesting than Python can compile.
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(f"{option(name, pattern)}: not a regular expression ({first_line(error)})") from error


def check_used(
    layers: Sequence[str], include: Collection[str], ignore: Collection[str], modules: Collection[str] = ()
) -> None:
    """Refuse patterns that match no layer, and selections without a layer.

    Args:
        layers: names of all prunable layers of the model.
        include, ignore: patterns, see the module.
        modules: names of all modules of the model. `ignore` may also name a module that is never pruned, as the head.

    Raises:
        InputError: a pattern matches no layer, or no layer is selected.
    """
    for name, patterns in (("include", include), ("ignore", ignore)):
        for pattern in patterns:
            dense = any(matches(pattern, module) for module in modules)
            if not any(matches(pattern, layer) for layer in layers) and not (dense and name == "ignore"):
                what = "is never pruned" if dense else "no layer of the model has this name"
                raise InputError(f"{option(name, pattern)}: {what}{_example(pattern, layers)}")
    if not any(selected(layer, include, ignore) for layer in layers):
        raise InputError(f"{option('include')}, {option('ignore')}: no layer is left to prune")


def _example(pattern: str, layers: Sequence[str]) -> str:
    """Suggest, for a message, names that are similar to a pattern, or else the name of any layer."""
    plain = re.sub(rf"^{REGEX}|[^\w.]", "", pattern).strip(".")
    names, length = [name.removesuffix(".weight").split(".") for name in layers], plain.count(".") + 1
    parts = sorted({".".join(name[i : i + length]) for name in names for i in range(len(name) - length + 1)})
    near = get_close_matches(plain, parts)
    return f"; did you mean {' or '.join(near)}?" if near else f"; one is {layers[0]}" if layers else ""
