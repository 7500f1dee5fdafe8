"""Damping: the diagonal that is added, and its effect on inputs that hardly vary."""

import pytest
import torch
from helpers.kernel_inputs import gram, normal, uniform

from sparsefw.solver.objective import damped
from sparsefw.solver.refit import refit

ROWS, D = 9, 24


def test_a_share_of_the_diagonal_is_added_to_a_copy():
    G = gram(D)
    before = G.clone()
    expected = G.double() + 0.1 * G.double().diagonal().diag()
    torch.testing.assert_close(damped(G, 0.1).double(), expected, rtol=1e-7, atol=0)
    assert torch.equal(G, before)


def test_without_damping_there_is_no_copy():
    G = gram(D)
    assert damped(G, 0.0) is G


@pytest.mark.parametrize("dead", [0, D // 2 + 1])
def test_inputs_that_are_all_but_dead(dead):
    """Damping by their own diagonal entry would let their weights grow to 1e6 and more, for a little less error."""
    X = normal(200, D, seed=5)
    X[:, :4] = (X[:, 4:8] + X[:, 8:12]) * 1e-7
    # Few tokens behind a ReLU leave most inputs dead.
    X[:, D - dead :] = 0
    G, W, mask = X.T @ X, normal(ROWS, D), uniform(ROWS, D, seed=7) < 0.4
    mask[:, :4] = True
    median = G.diagonal()[: D - dead].median()

    def moved(G: torch.Tensor) -> torch.Tensor:
        return (refit(W, G, mask, W, 10).Z - W)[:, :4].abs().max()

    H = damped(G, 0.1)
    torch.testing.assert_close(H.diagonal()[:4], (0.1 * 0.01 * median).expand(4), rtol=1e-5, atol=0)
    assert moved(H) < 1
    assert moved(G + (0.1 * G.diagonal()).diag()) > 1e4
