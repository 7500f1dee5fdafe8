"""Blocks in half precision that compute in fp32, so that rounding hides no difference between two runs of them."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from sparsefw.model.flow import name_of
from sparsefw.model.operands import tensors_in

HALF = (torch.float16, torch.bfloat16)

# Functions that return their first argument in another dtype, by name.
CASTS = ("to", "type", "half", "bfloat16")


class Precise(TorchFunctionMode):
    """Inside the `with` block, functions of fp32 tensors and others in half precision take all of them in fp32.

    No fp32 tensor is made a tensor in half precision. So a block whose hidden states are in fp32 computes in fp32. A
    weight is in fp32 while it is used, and no longer.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        dtypes = {x.dtype for x in tensors_in((args, kwargs))}
        # A mask may be filled with the least number of the dtype of the hidden states, which half precision has not.
        if torch.float32 not in dtypes and name != "masked_fill":
            return func(*args, **kwargs)
        if dtypes.isdisjoint(HALF):
            out = func(*args, **kwargs)
            cast = name in CASTS and isinstance(out, Tensor) and out.dtype in HALF
            return args[0] if cast else out
        if _writes(name):
            # A tensor that is written to keeps its dtype.
            first, args = args[0], tree_map(lambda x: _as(x, args[0].dtype), args[1:])
            return func(first, *args, **tree_map(lambda x: _as(x, first.dtype), kwargs))
        return func(*tree_map(_as, args), **tree_map(_as, kwargs))


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return name in ("__setitem__", "__set__") or name.startswith("__i") or (name.endswith("_") and name[:2] != "__")


def _as(x: Any, dtype: torch.dtype = torch.float32) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in (*HALF, torch.float32) else x
