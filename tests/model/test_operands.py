"""Tensors are found in all containers that torch knows, in torch's order."""

from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparsefw.model.operands import tensors_in

A, B, C = torch.zeros(1), torch.nn.Parameter(torch.zeros(2)), torch.zeros(3, device="meta")
Pair = namedtuple("Pair", "first second")

VALUES = [
    A,
    None,
    (),
    "word",
    ((A, 1.5, B), {"mask": None, "dim": -1}),
    {"z": A, "a": [B, {"c": C}], "dtype": torch.float32},
    [A, A, (slice(None, 3), ..., torch.Size([2]))],
    Pair(B, [A, C]),
    OrderedDict(b=B, a=A),
    [deque([A, B])],
    torch.max(torch.zeros(2, 2), 1),
    BaseModelOutputWithPast(last_hidden_state=A, hidden_states=(B, C)),
    [object(), torch.relu],
]


@pytest.mark.parametrize("values", VALUES, ids=lambda values: type(values).__name__)
def test_as_torch_finds_them(values):
    expected = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    found = tensors_in(values)
    assert len(found) == len(expected)
    assert all(x is y for x, y in zip(found, expected, strict=True))
