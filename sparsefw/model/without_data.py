"""Calls of torch functions on tensors without data.

A block runs in parts, and each part makes the calls before its beginning again, for every micro-batch. On meta tensors
they compute nothing, yet torch takes 0.2 ms to find the shape of a product and 2 ms for that of attention. These depend
on the shapes, dtypes and constants that a function is given, and on modes of torch, so they are found once.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_map

from sparsefw.model.operands import tensors_in

# More results are not remembered: they are forgotten, and found again. One takes about a kilobyte.
MOST_RESULTS = 10_000

# Makes the result of a call anew, by all that the result depends on.
_results: dict[Hashable, Callable[[], Any]] = {}

# Types of constants that are known by their values. They are written beside their types: 1, 1.0 and True are equal.
_CONSTANTS = frozenset(
    [type(None), type(...), bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.memory_format]
)


class _UnknownError(Exception):
    """What a function is given has parts that a result may depend on in other ways."""


def call_without_data(func: Any, args: tuple, kwargs: dict) -> tuple[Any, list[Tensor]]:
    """Call a function with meta tensors in place of its tensors.

    Args:
        func: a torch function.
        args, kwargs: what it is given. Tensors with data are not touched, and a device is taken for the meta device.

    Returns:
        What the function returns, and those of the tensors with data that it would have written to.
    """
    key = _key(func, args, kwargs)
    if key in _results:
        with torch._C.DisableTorchFunction():
            return _results[key](), []
    copies: list[tuple[Tensor, Tensor]] = []

    def to_meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        copies.append((value, value.to("meta")))
        return copies[-1][1]

    args, kwargs = tree_map(to_meta, (args, kwargs))
    operands = tensors_in((args, kwargs))
    versions = {id(x): x._version for x in operands}
    out = func(*args, **kwargs)
    written = {id(x) for x in operands if x._version != versions[id(x)]}
    if key is not None and not written and (anew := _maker(out, operands)):
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = anew
    return out, [tensor for tensor, copy in copies if id(copy) in written]


def _key(func: Any, args: tuple, kwargs: dict) -> Hashable:
    """All that the form of a call's result depends on; None if that is not known."""
    modes = tuple(type(mode) for mode in _get_current_function_mode_stack())
    try:
        # Modes would see how tensors are looked at.
        with torch._C.DisableTorchFunction():
            return func, modes, torch.get_default_dtype(), _known_by(args), _known_by(kwargs)
    except _UnknownError:
        return None


def _known_by(value: Any) -> Hashable:
    """All of a value that the form of a result depends on.

    Raises:
        _UnknownError: which that is, is not known.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.dtype.is_complex:
            raise _UnknownError
        return kind, value.dtype, value.shape, value.stride()
    if kind is tuple or kind is list:
        return kind, *map(_known_by, value)
    if kind is dict:
        return kind, *[(key, _known_by(item)) for key, item in value.items()]
    if kind is slice:
        return kind, _known_by(value.start), _known_by(value.stop), _known_by(value.step)
    if kind not in _CONSTANTS:
        raise _UnknownError
    return kind, value


def _maker(out: Any, operands: list[Tensor]) -> Callable[[], Any] | None:
    """Makes such a result anew; None if there is more to it than tensors of such forms.

    Views become tensors of their own: there is no data that they could share.
    """
    if isinstance(out, Tensor):
        plain = type(out) is Tensor and out.is_meta and out.layout is torch.strided and not out.requires_grad
        # Some functions return what they are given, and it may be asked whether they do.
        if not plain or any(out is x for x in operands):
            return None
        size, stride, dtype = out.size(), out.stride(), out.dtype
        return lambda: torch.empty_strided(size, stride, dtype=dtype, device="meta")
    if type(out) is tuple or type(out) is list:
        kind, makers = type(out), [_maker(item, operands) for item in out]
        if all(makers):
            return lambda: kind([make() for make in makers if make])
    return None
