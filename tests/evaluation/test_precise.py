"""Half precision that computes in fp32."""

import pytest
import torch
from torch.nn import functional

from sparsefw.evaluation.precise import Precise

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 16, generator=GENERATOR)
W, B = (torch.randn(*shape, generator=GENERATOR).bfloat16() for shape in [(8, 16), (8,)])


def test_a_product_with_weights_in_half_precision():
    with Precise():
        out = functional.linear(X, W, bias=B)
    assert torch.equal(out, functional.linear(X, W.float(), B.float()))
    assert W.dtype == torch.bfloat16


@pytest.mark.parametrize("cast", [lambda x: x.to(torch.bfloat16), lambda x: x.half(), lambda x: x.to(W)])
def test_no_tensor_is_rounded(cast):
    with Precise():
        assert torch.equal(cast(X), X)


def test_what_is_written_to_stays_as_it_is():
    sums, rows = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 8)
    with Precise():
        sums.index_add_(0, torch.tensor([0, 2]), X[:2, :8])
        rows[1] = W[0, :8]
        rows += B
    assert torch.equal(sums[[0, 2]], X[:2, :8].bfloat16())
    assert torch.equal(rows, torch.stack([B, B + W[0, :8].float(), B]).float())


def test_a_mask_is_filled_with_the_least_number():
    least = torch.finfo(torch.float32).min
    with pytest.raises(RuntimeError, match="overflow"):
        W.masked_fill(W > 0, least)
    with Precise():
        filled = W.masked_fill(W > 0, least)
    assert (filled[W > 0] == least).all()


def test_other_functions_are_as_they_are():
    with Precise():
        assert (W + 1).dtype == torch.bfloat16
        assert (X > 0).dtype == torch.bool
        assert X.type() == "torch.FloatTensor"
