"""What a launcher cannot handle is refused, by the name of the argument."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, row_state

from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import Backend

Z, ONES, MASK = torch.zeros(3, 4), torch.ones(4), torch.zeros(3, 4, dtype=torch.bool)
SQUARE, ROWS, INDEX = torch.zeros(4, 4), torch.zeros(3), torch.arange(3)
TURNED, EVERY_SECOND = torch.zeros(4, 3), torch.zeros(6)[::2]
BITS = torch.zeros(3, 2, dtype=torch.uint8)
# Arguments that are valid, as the first test shows.
VALID = {
    "product": dict(E=Z, G=SQUARE),
    "gram_accumulate": dict(G=SQUARE, X=torch.zeros(5, 4)),
    "cross_accumulate": dict(B=Z, D=torch.zeros(5, 3), X=torch.zeros(5, 4)),
    "mirror_lower": dict(G=SQUARE),
    "lmo": dict(score=Z, k=2),
    "row_swaps": dict(W=Z, G=SQUARE, R=Z, V=MASK, limit=1),
    "conjugate_step": dict(Z=Z, R=Z, P=Z, U=Z, rz=ROWS, enough=ROWS, inverse=ONES, mask=MASK),
    "take_rows": dict(X=Z, Y=Z, taken=MASK[:, 0].clone()),
    "adam_step": dict(W=ONES, gradient=ONES, index=INDEX, weight=ROWS, m=ROWS, v=ROWS, rate=0.1, step=1),
    "packed_product": dict(x=torch.zeros(5, 16), values=Z, mask=BITS),
    "unpack": dict(values=Z, mask=BITS, cols=16),
}
# The last argument of each case is the one that is named.
CASES = [
    ("product", dict(E=Z.int())),
    ("product", dict(E=None)),
    ("product", dict(G=torch.zeros(4, 4, device="meta"))),
    ("product", dict(out=TURNED)),
    ("product", dict(precision="fp8")),
    ("product", dict(add=True)),
    ("gram_accumulate", dict(X=torch.zeros(2, 5, 4))),
    ("gram_accumulate", dict(precision="bf16")),
    ("cross_accumulate", dict(D=torch.zeros(5, 3, dtype=torch.bfloat16))),
    ("mirror_lower", dict(G=Z)),
    ("lmo", dict(k=5)),
    ("lmo", dict(group=2, k=3)),
    ("lmo", dict(group=3)),
    ("lmo", dict(k=torch.ones(4, dtype=torch.int32))),
    ("lmo", dict(score=torch.zeros(3, 64), group=64)),
    ("row_swaps", dict(R=TURNED.T)),
    ("row_swaps", dict(limit=-1)),
    ("conjugate_step", dict(enough=EVERY_SECOND)),
    ("take_rows", dict(taken=MASK[:, 0])),
    ("adam_step", dict(index=ROWS)),
    ("adam_step", dict(m=ONES)),
    ("packed_product", dict(x=Z, mask=BITS)),
    ("packed_product", dict(values=ONES, starts=INDEX)),
    ("unpack", dict(mask=BITS.bool())),
]


def on_device(arguments):
    """Tensors on the device, with the gaps that `to` would close; those on the meta device stay there."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
        if isinstance(x, torch.Tensor) and x.device.type != "meta"
        else x
        for name, x in arguments.items()
    }


@pytest.mark.parametrize("operation", VALID)
def test_the_arguments_that_cases_change_are_valid(operation):
    getattr(triton_ops, operation)(**on_device(VALID[operation]))


@pytest.mark.parametrize(("operation", "change"), CASES, ids=lambda x: x if isinstance(x, str) else [*x][-1])
def test_arguments_are_refused_by_their_name(operation, change):
    with pytest.raises((ValueError, TypeError), match=f"^{[*change][-1]}: "):
        getattr(triton_ops, operation)(**on_device(VALID[operation] | change))


@pytest.mark.parametrize(("name", "x"), [("diag", ROWS), ("M", TURNED.T), ("eta", EVERY_SECOND)])
def test_states_are_refused_by_their_name(name, x):
    state = row_state(*(tensor.to(DEVICE, copy=True) for tensor in (Z, ONES, Z, Z, Z, MASK, Z)), 2)
    setattr(state, name, on_device({name: x})[name])
    with pytest.raises(ValueError, match=f"^{name}: "):
        triton_ops.row_step(state)


def test_a_backend_has_a_precision():
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32x3, tf32, bf16, got 'IEEE'"):
        Backend(triton_ops, "IEEE")
