"""What calls of torch functions are given and return, with tensors inside tuples, lists, dicts and other containers.

Every call of a block's forward is looked at, so the usual values are told by their types; torch's own search, which
knows all containers, takes ten times as long.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Types of values without tensors inside.
_PLAIN = frozenset(
    [type(None), type(...), bool, int, float, complex, str, slice, torch.Size, torch.dtype, torch.device, torch.layout]
)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors among nested values, in order."""
    found: list[Tensor] = []
    _collect(values, found)
    return found


def _collect(values: Any, found: list[Tensor]) -> None:
    """Append the tensors among values."""
    kind = type(values)
    if kind in _PLAIN:
        return
    if isinstance(values, Tensor):
        found.append(values)
    elif kind is tuple or kind is list:
        for value in values:
            _collect(value, found)
    elif kind is dict:
        for value in values.values():
            _collect(value, found)
    else:
        found += [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
