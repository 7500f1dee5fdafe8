"""torch's own attention module, made to call the functions that it consists of one by one."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


@contextmanager
def attention_by_calls() -> Iterator[None]:
    """Inside the `with` block, `nn.MultiheadAttention` multiplies with one matrix at a time.

    By itself it calls one fused function, or one function of Python whose inside a torch function mode does not see.
    """
    fast, whole = torch.backends.mha.get_fastpath_enabled(), functional.multi_head_attention_forward
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        functional.multi_head_attention_forward = _not_dispatched(whole)
        yield
    finally:
        functional.multi_head_attention_forward = whole
        torch.backends.mha.set_fastpath_enabled(fast)


def _not_dispatched(function: Any) -> Any:
    """The same function of Python, which is not handed to a torch function mode as a whole."""
    names = function.__globals__ | {"has_torch_function": lambda operands: False}
    same = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same
