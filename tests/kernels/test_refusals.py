"""What a launcher cannot handle is refused, by the name of the argument."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, example

from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import Backend

# Weights of the examples are (3, 16).
TURNED, VECTOR, EVERY_SECOND = torch.zeros(16, 3), torch.zeros(3), torch.zeros(6)[::2]
INDEX, BITS = torch.arange(3), torch.zeros(3, 2, dtype=torch.uint8)
# Changes of an example's arguments. The last one is the one that is named.
CASES = [
    ("product", dict(E=TURNED.T.int())),
    ("product", dict(E=None)),
    ("product", dict(G=torch.zeros(16, 16, device="meta"))),
    ("product", dict(out=TURNED)),
    ("product", dict(precision="fp8")),
    ("product", dict(out=None, add=True)),
    ("gram_accumulate", dict(X=torch.zeros(2, 5, 16))),
    ("gram_accumulate", dict(precision="bf16")),
    ("cross_accumulate", dict(D=torch.zeros(5, 3, dtype=torch.bfloat16))),
    ("mirror_lower", dict(G=TURNED)),
    ("lmo", dict(k=17)),
    ("lmo", dict(group=2, k=3)),
    ("lmo", dict(group=3)),
    ("lmo", dict(k=torch.ones(4, dtype=torch.int32))),
    ("lmo", dict(score=torch.zeros(3, 64), group=64)),
    ("row_step", dict(diag=VECTOR)),
    ("row_step", dict(M=TURNED.T)),
    ("row_step", dict(eta=EVERY_SECOND)),
    ("row_swaps", dict(R=TURNED.T)),
    ("row_swaps", dict(limit=-1)),
    ("conjugate_step", dict(enough=EVERY_SECOND)),
    ("take_rows", dict(taken=torch.zeros(6, dtype=torch.bool)[::2])),
    ("adam_step", dict(index=VECTOR)),
    ("adam_step", dict(m=VECTOR)),
    ("packed_product", dict(x=TURNED.T, mask=BITS[:, :1])),
    ("packed_product", dict(values=VECTOR, starts=INDEX)),
    ("unpack", dict(mask=BITS.bool())),
]


def on_device(x):
    """A tensor on the device, with the gaps that `to` would close; one on the meta device stays there."""
    if not isinstance(x, torch.Tensor) or x.device.type == "meta":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda x: x if isinstance(x, str) else [*x][-1])
def test_arguments_are_refused_by_their_name(name, change):
    change = {key: on_device(x) for key, x in change.items()}
    arguments = example(name, 3, 16)
    if name == "row_step":
        vars(arguments["state"]).update(change)
    else:
        arguments |= change
    with pytest.raises((ValueError, TypeError), match=f"^{[*change][-1]}: "):
        getattr(triton_ops, name)(**arguments)


def test_a_backend_has_a_precision():
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32x3, tf32, bf16, got 'IEEE'"):
        Backend(triton_ops, "IEEE")
