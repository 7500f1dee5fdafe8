"""Rounding to few bits: zeros stay, weights lie on the grid of their group, and making up for the error pays."""

import few_bits
import pytest
import torch
from helpers.kernel_inputs import gram, normal
from helpers.problems import error

from sparsefw.solver.methods import Rows


@pytest.mark.parametrize("kept", [1.0, 0.4])
def test_rounding(kept):
    W, G = normal(40, 192), gram(192)
    W = W * (W.abs() >= W.abs().quantile(1 - kept, dim=1, keepdim=True))
    rows = Rows(W, G, W.abs(), 192, torch.float32, G)
    errors = []
    for bits, compensate in ((3, False), (3, True), (8, True)):
        mask, Q = few_bits.rounded(rows, bits, 64, compensate)
        assert torch.equal(mask, W != 0)
        assert not Q[W == 0].any()
        # The kept weights of a row, group by group.
        for values in (row[own] for row, own in zip(Q, mask, strict=True)):
            assert all(len(group.unique()) <= 2**bits for group in values.split(64))
        errors.append(error(W, Q, G).sum())
    assert errors[2] < 0.01 * errors[1]
    assert errors[1] < 0.9 * errors[0]
