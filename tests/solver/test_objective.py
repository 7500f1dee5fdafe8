"""Saliencies, damping and targets."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from helpers.kernel_inputs import DEVICE, gram, normal, uniform

from sparsefw.kernels.lmo import reference
from sparsefw.solver.config import METHODS, WARM_STARTS, PruneConfig
from sparsefw.solver.layer import prune_layers, solve_layer
from sparsefw.solver.methods import CHOOSE, SALIENCIES, add_method, add_saliency, choice_of
from sparsefw.solver.refit import refit
from sparsefw.solver.targets import damped, find_target

ROWS, D = 13, 40


def test_saliencies_by_definition():
    W, G = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[4.0, 5.0], [5.0, 9.0]])
    assert torch.equal(SALIENCIES["magnitude"](W, G), torch.tensor([[1.0, 2], [3, 4]]))
    assert torch.equal(SALIENCIES["wanda"](W, G), torch.tensor([[2.0, 6], [6, 12]]))
    relative = torch.tensor([[1 / 3 + 1 / 4, 2 / 3 + 2 / 6], [3 / 7 + 3 / 4, 4 / 7 + 4 / 6]])
    torch.testing.assert_close(SALIENCIES["ria"](W, G), relative * torch.tensor([2.0, 3.0]).sqrt())
    # Rows and columns of zeros stay zero.
    for saliency in SALIENCIES.values():
        S = saliency(torch.tensor([[0.0, 0.0], [0.0, 4.0]]).bfloat16(), torch.tensor([0.0, 9.0]).diag())
        assert S.dtype == torch.float32
        assert (S > 0).tolist() == [[False, False], [False, True]]


class TestDamping:
    def test_a_share_of_the_diagonal_is_added_to_a_copy(self):
        G = gram(D)
        before = G.clone()
        expected = G.double() + 0.1 * G.double().diagonal().diag()
        torch.testing.assert_close(damped(G, 0.1).double(), expected, rtol=1e-7, atol=0)
        assert torch.equal(G, before)
        assert damped(G, 0.0) is G

    @pytest.mark.parametrize(
        ("method", "reconstruct"), [("sparsefw", 0), ("sparsefw", 1), ("frank-wolfe", 1), ("wanda", 1)]
    )
    def test_masks_alone_are_damped_unless_what_they_are_compared_with_takes_more(self, method, reconstruct):
        found, compare = [], tuple({"frank-wolfe"} - {method})
        for damp in (0, 9):
            found.append(normal(ROWS, D))
            config = PruneConfig(method=method, compare=compare, reconstruct=reconstruct, damp=damp).on(found[0].device)
            prune_layers([("a", found[-1])], gram(D), "frank-wolfe", config)
        assert torch.equal(*found) == (method == "sparsefw" and reconstruct > 0)

    @pytest.mark.parametrize("dead", [0, 13])
    def test_inputs_that_are_all_but_dead(self, dead):
        """Damping by their own diagonal entry would let their weights grow to 1e6 and more, for a little less error."""
        X = normal(200, 24, seed=5)
        X[:, :4] = (X[:, 4:8] + X[:, 8:12]) * 1e-7
        # Few tokens behind a ReLU leave most inputs dead.
        X[:, 24 - dead :] = 0
        G, W, mask = X.T @ X, normal(9, 24), uniform(9, 24, seed=7) < 0.4
        mask[:, :4] = True
        median, H = G.diagonal()[: 24 - dead].median(), damped(G, 0.1)

        def moved(G: torch.Tensor) -> torch.Tensor:
            return (refit(W, G, mask, W, 10).Z - W)[:, :4].abs().max()

        torch.testing.assert_close(H.diagonal()[:4], (0.1 * 0.01 * median).expand(4), rtol=1e-5, atol=0)
        assert moved(H) < 1
        assert moved(G + (0.1 * G.diagonal()).diag()) > 1e4


class TestTargets:
    @pytest.mark.parametrize("within", [False, True])
    def test_many_steps_solve_the_normal_equations(self, within):
        W, H, B = normal(ROWS, D), damped(gram(D), 0.1), normal(ROWS, D, seed=1) * 50
        support = uniform(ROWS, D) < 0.6 if within else torch.ones(ROWS, D, dtype=torch.bool, device=DEVICE)
        T = find_target(W, H, B.clone(), 80, support=support)
        assert torch.equal(T[~support], W[~support])
        for w, b, t, free in zip(W.double(), B.double(), T.double(), support, strict=True):
            best = w[free] + torch.linalg.solve(H.double()[free][:, free], b[free])
            torch.testing.assert_close(t[free], best, rtol=0, atol=1e-5 * best.abs().max().item())
        if not within:
            assert torch.equal(T, find_target(W, H, B.clone(), 80))

    def test_what_stays(self):
        """Nothing lost leaves the weights; so do dead inputs. Targets are in fp32 whatever the weight."""
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        T = find_target(W, G, torch.zeros(ROWS, D, device=DEVICE), 4)
        assert torch.equal(T, W)
        assert T is not W
        half = find_target(W.bfloat16(), G, B.clone(), 4)
        assert torch.equal(half, find_target(W.bfloat16().float(), G, B.clone(), 4))
        G[3], G[:, 3], B[:, 3] = 0, 0, 0
        T = find_target(W, G, B, 8)
        assert torch.equal(T[:, 3], W[:, 3])
        assert T.isfinite().all()
        assert (T[:, 4] != W[:, 4]).any()


def test_a_caller_adds_a_saliency_and_a_method():
    """The saliency sees the whole Gram matrix; the method negates the weights of the highest saliency."""

    def negated(problem, config, backend):
        mask = backend.lmo(problem.saliency, problem.k, group=problem.group)
        return choice_of(problem, mask, -problem.W * mask, backend)

    W, G = normal(ROWS, D), gram(D)
    with ExitStack() as kept:
        for table in (METHODS, CHOOSE, SALIENCIES):
            kept.enter_context(patch.dict(table))
        add_saliency("mine", lambda W, G: W.abs() * G.abs().sum(0))
        kept.callback(WARM_STARTS.remove, "mine")
        add_method("ours", negated, saliency="mine", changes_weights=True)
        expected = reference((W.abs() * G.abs().sum(0)).cpu(), D // 2)
        for method, sign in (("mine", 1), ("ours", -1)):
            mask, weight, _ = solve_layer(W, G, PruneConfig(method=method, sparsity="0.5"))
            assert torch.equal(mask.cpu(), expected)
            assert torch.equal(weight, sign * W * mask)
        assert PruneConfig(warm_start="mine").warm_start == "mine"
