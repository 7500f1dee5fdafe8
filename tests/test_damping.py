"""Damping: what is added inside, what comes back after, and what it does to inputs that hardly vary."""

import pytest
import torch
from kernel_inputs import gram, normal, uniform

from sparsefw.damping import damped
from sparsefw.kernels import reference
from sparsefw.refit import refit

ROWS, D = 9, 24


def test_inside_and_after():
    G = gram(D)
    before = G.clone()
    with damped(G, 0.1) as added:
        expected = before.double() + 0.1 * before.double().diagonal().diag()
        torch.testing.assert_close(G.double(), expected, rtol=1e-7, atol=0)
        torch.testing.assert_close(added, 0.1 * before.diagonal())
    assert torch.equal(G, before)


def test_without_damping_nothing_changes():
    G = gram(D)
    before = G.clone()
    with damped(G, 0.0) as added:
        assert torch.equal(G, before)
        assert not added.any()


def test_inputs_that_are_all_but_dead():
    """Their own scale would let their weights grow to 1e6 and more, to take a little error from the others."""
    X = normal(200, D, seed=5)
    X[:, :4] = (X[:, 4:8] + X[:, 8:12]) * 1e-7
    G, W, mask = X.T @ X, normal(ROWS, D), uniform(ROWS, D, seed=7) < 0.4
    mask[:, :4] = True
    median = G.diagonal().median()

    def moved(G: torch.Tensor) -> torch.Tensor:
        return (refit(W, G, mask, W, 10, ops=reference).Z - W)[:, :4].abs().max()

    with damped(G, 0.1):
        torch.testing.assert_close(G.diagonal()[:4], (0.1 * 0.01 * median).expand(4), rtol=1e-5, atol=0)
        assert moved(G) < 1
    assert moved(G + (0.1 * G.diagonal()).diag()) > 1e4


def test_restored_after_an_exception():
    """Bit for bit: a diagonal divided by what it was multiplied with would not be."""
    G = gram(131)
    before = G.clone()
    with pytest.raises(KeyError), damped(G, 0.7):
        raise KeyError
    assert torch.equal(G, before)
    assert not torch.equal(G.diagonal() * 1.7 / 1.7, before.diagonal())
