"""Products of an input with a matrix, as a block's forward makes them.

There is no list of layer types: a layer is a product of an input with a matrix that is (a slice of) one of the block's
own parameters. So transposed layouts and the experts of a mixture, slices of one 3-D parameter, are found too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Position of the input and of the weight among the arguments, and whether the weight is stored (in, out).
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    nn.functional.linear: (0, 1, False),
    torch.matmul: (0, 1, True),
    torch.Tensor.matmul: (0, 1, True),
    torch.Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
    torch.addmm: (1, 2, True),
}

# Position of the bias among the arguments, and its name, for the functions that take one.
_BIASES: dict[Any, tuple[int, str]] = {nn.functional.linear: (2, "bias"), torch.addmm: (0, "input")}


@dataclass(frozen=True)
class Product:
    """A call that multiplies an input with a matrix.

    Attributes:
        X: the input, (..., in).
        weight: (out, in) view of the matrix.
        bias: (out,), added to the product; None: nothing is.
    """

    X: Tensor
    weight: Tensor
    bias: Tensor | None


def product_of(func: Any, args: tuple, kwargs: dict) -> Product | None:
    """The product that a function call makes; None if it makes none."""
    if func not in _PRODUCTS:
        return None
    input_at, weight_at, transposed = _PRODUCTS[func]
    weight = args[weight_at] if len(args) > weight_at else kwargs.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    X = args[input_at] if len(args) > input_at else kwargs["input"]
    bias_at, bias_name = _BIASES.get(func, (len(args), ""))
    bias = args[bias_at] if len(args) > bias_at else kwargs.get(bias_name)
    return Product(X, weight.T if transposed else weight, bias)
