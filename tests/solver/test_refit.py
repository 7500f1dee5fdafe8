"""The refit against float64 least squares of every row, its invariances, and the weights that it must not change."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, gram, normal, uniform
from helpers.problems import TRITON
from helpers.refits import damp_by, error, exact

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver.refit import Fit, inverse_diagonal, refit

ROWS, D = 9, 24


def random_mask(rows=ROWS, d=D, share=0.4, seed=7):
    return uniform(rows, d, seed=seed) < share


def scaled_gram(d=D):
    """A Gram matrix of inputs of very different size."""
    scale = torch.logspace(-2, 2, d, device=DEVICE)
    return gram(d) * (scale * scale[:, None])


def rank_deficient_gram(d=D):
    """A Gram matrix of fewer tokens than inputs, with two equal inputs and two nearly equal ones."""
    X = normal(10, d, seed=3)
    X[:, 1] = X[:, 0]
    X[:, 3] = X[:, 2] * (1 + 1e-4)
    return X.T @ X


def run(W, G, mask, steps, start=None, backend=TORCH):
    return refit(W, G, mask, W.float() if start is None else start, steps, backend=backend)


class TestLeastSquares:
    @pytest.mark.parametrize("make", [gram, scaled_gram])
    @pytest.mark.parametrize("damp", [0.0, 0.1])
    def test_ends_at_the_exact_solution(self, make, damp):
        W, G, mask = normal(ROWS, D), damp_by(make(D), damp), random_mask()
        fit, best = run(W, G, mask, 40), exact(W, G, mask)
        scale = G.diagonal().double().sqrt()
        torch.testing.assert_close(fit.Z * scale, best * scale, rtol=0, atol=1e-4 * (best * scale).abs().max().item())
        torch.testing.assert_close(error(W, fit.Z, G), error(W, best, G), rtol=1e-6, atol=0)
        assert error(W, W * mask, G).sum() > 1.3 * error(W, best, G).sum()

    def test_rank_deficient(self):
        """With damping the solution is unique; without it, only its error is."""
        W, mask = normal(ROWS, D), random_mask()
        mask[:, :4] = True
        for damp in (0.1, 0.0):
            G = damp_by(rank_deficient_gram(), damp)
            fit, best = run(W, G, mask, 20), exact(W, G, mask)
            excess = error(W, fit.Z, G) - error(W, best, G)
            assert (excess <= 1e-4 * error(W, W * mask, G)).all()
            if damp:
                torch.testing.assert_close(fit.Z.double(), best, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("exponent", [-40, 0, 40])
    @pytest.mark.parametrize("make", [gram, rank_deficient_gram])
    def test_more_steps_than_there_is_to_gain(self, make, exponent):
        """A row's gain falls below the smallest number long before the last step."""
        W, G, mask = normal(200, D), damp_by(make(D)) * 2.0**exponent, random_mask(200)
        few, many = (error(W, run(W, G, mask, steps).Z, G) for steps in (20, 200))
        assert (many <= few * (1 + 1e-6)).all()

    def test_conjugate_directions(self):
        """Two distinct eigenvalues under the mask: two steps of conjugate gradients are exact, of descent are not."""
        W, mask = normal(ROWS, D), random_mask()
        G = torch.eye(D, device=DEVICE) + 0.2
        start = normal(ROWS, D, seed=1)
        one, two = (error(W, run(W, G, mask, steps, start).Z, G) for steps in (1, 2))
        best = error(W, exact(W, G, mask), G)
        torch.testing.assert_close(two, best, rtol=1e-6, atol=0)
        assert one.sum() > best.sum() * (1 + 1e-2)

    @pytest.mark.parametrize(
        "make", [gram, scaled_gram, lambda d: damp_by(rank_deficient_gram(d)), rank_deficient_gram]
    )
    def test_no_step_raises_the_error(self, make):
        W, G, mask = normal(ROWS, D), make(D), random_mask()
        start = error(W, W * mask, G)
        last = start
        for steps in range(1, 30):
            now = error(W, run(W, G, mask, steps).Z, G)
            # An error far below the start's is rounding of the start's.
            assert (now <= last * (1 + 1e-6) + 1e-6 * start).all(), steps
            last = now

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_residual_and_error_are_those_of_the_weights(self, steps):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        fit = run(W, G, mask, steps)
        R = (W.double() - fit.Z.double()) @ G.double()
        torch.testing.assert_close(fit.R.double(), R, rtol=0, atol=1e-5 * R.abs().max().item())
        torch.testing.assert_close(fit.error.double(), error(W, fit.Z, G), rtol=1e-5, atol=0)
        assert torch.equal(fit.mask, mask)

    def test_starts_where_it_is_told(self):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        # Entries outside of the mask are not read.
        start = normal(ROWS, D, seed=1).masked_fill(~mask, torch.nan)
        before = start.clone()
        fit = run(W, G, mask, 0, start)
        assert torch.equal(fit.Z, start.masked_fill(~mask, 0))
        fit = run(W, G, mask, 40, start)
        torch.testing.assert_close(error(W, fit.Z, G), error(W, exact(W, G, mask), G), rtol=1e-5, atol=0)
        torch.testing.assert_close(start, before, rtol=0, atol=0, equal_nan=True)


class TestInvariance:
    """Powers of two change exponents only, so that these invariances hold bit for bit."""

    def test_scale_of_the_inputs(self):
        """The preconditioner is the diagonal, so inputs may have any units."""
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        units = 2.0 ** torch.arange(-12, 12, device=DEVICE)
        fit, other = run(W, G, mask, 5), run(W / units, G * (units * units[:, None]), mask, 5)
        assert torch.equal(other.Z, fit.Z / units)
        assert torch.equal(other.error, fit.error)

    # About 1e-12 and 1e12.
    @pytest.mark.parametrize("exponent", [-40, 40])
    def test_scale_of_the_gram_matrix(self, exponent):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        fit, other = run(W, G, mask, 5), run(W, G * 2.0**exponent, mask, 5)
        assert torch.equal(other.Z, fit.Z)
        assert torch.equal(other.error, fit.error * 2.0**exponent)

    def test_scale_of_the_weights(self):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        assert torch.equal(run(W * 2.0**-30, G, mask, 5).Z, run(W, G, mask, 5).Z * 2.0**-30)

    def test_dtype_of_the_weights(self):
        W, G, mask = normal(ROWS, D, dtype=torch.bfloat16), gram(D), random_mask()
        fit, other = run(W, G, mask, 5), run(W.float(), G, mask, 5)
        assert fit.Z.dtype == fit.R.dtype == torch.float32
        assert torch.equal(fit.Z, other.Z)
        assert torch.equal(fit.error, other.error)


class TestEdges:
    def test_zero_outside_the_mask(self):
        W, mask = normal(ROWS, D), random_mask()
        for steps in (0, 1, 4):
            Z = run(W, scaled_gram(), mask, steps).Z
            assert (Z[~mask] == 0).all()
            assert (Z[mask] != 0).all()

    def test_rows_that_keep_nothing_or_everything(self):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        mask[2], mask[5] = False, True
        fit = run(W, G, mask, 6)
        assert (fit.Z[2] == 0).all()
        torch.testing.assert_close(fit.error[2].double(), error(W, torch.zeros_like(W), G)[2], rtol=1e-5, atol=0)
        assert torch.equal(fit.Z[5], W[5])
        assert fit.error[5] == 0
        # The other rows are the same as alone, up to the roundings of a product of fewer rows: close to the
        # optimum the error feels only the square of a change of Z.
        others = torch.tensor([0, 1, 3, 4, 6, 7, 8], device=DEVICE)
        alone = run(W[others], G, mask[others], 6)
        torch.testing.assert_close(fit.error[others], alone.error, rtol=2e-6, atol=0)
        torch.testing.assert_close(fit.Z[others], alone.Z, rtol=0, atol=1e-3)

    def test_dead_inputs_stay(self):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        dead = torch.tensor([0, 3, 17], device=DEVICE)
        G[dead], G[:, dead] = 0, 0
        mask[:, 3] = True
        fit = run(W, G, mask, 30)
        assert torch.equal(fit.Z[:, dead], (W * mask)[:, dead])
        live = G.diagonal() > 0
        best = exact(W[:, live], G[live][:, live], mask[:, live])
        torch.testing.assert_close(fit.Z[:, live].double(), best, rtol=0, atol=1e-4)

    def test_no_inputs_at_all(self):
        W, mask = normal(ROWS, D), random_mask()
        fit = run(W, torch.zeros(D, D, device=DEVICE), mask, 3)
        assert torch.equal(fit.Z, W.masked_fill(~mask, 0))
        assert (fit.error == 0).all()

    def test_inverse_diagonal(self):
        G = torch.tensor([[4.0, 1, 0], [1, 0.5, 0], [0, 0, 0]], device=DEVICE)
        assert inverse_diagonal(G).tolist() == [0.25, 2, 0]

    def test_leaves_its_inputs(self):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        start = W.clone()
        before = [X.clone() for X in (W, G, mask, start)]
        run(W, G, mask, 3, start)
        assert all(torch.equal(X, Y) for X, Y in zip((W, G, mask, start), before, strict=True))


class TestPrecision:
    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    @pytest.mark.parametrize("operations", [cpu, triton_ops])
    def test_low_precision_gains_nearly_as_much(self, precision, operations):
        W, G, mask = normal(ROWS, D), damp_by(gram(D)), random_mask()
        exactly, fit = run(W, G, mask, 4), run(W, G, mask, 4, backend=Backend(operations, precision))
        if operations is cpu or precision == "bf16" or DEVICE == "cuda":
            # Triton's interpreter multiplies fp32 operands as they are.
            assert not torch.equal(fit.Z, exactly.Z)
        gain = error(W, W * mask, G) - error(W, exactly.Z, G)
        assert (error(W, fit.Z, G) - error(W, exactly.Z, G)).sum() < {"tf32": 1e-4, "bf16": 1e-2}[
            precision
        ] * gain.sum()

    def test_of_every_product(self, monkeypatch):
        seen, product = [], cpu.product
        monkeypatch.setattr(cpu, "product", lambda *a, **o: seen.append(o["precision"]) or product(*a, **o))
        run(normal(ROWS, D), gram(D), random_mask(), 2, backend=Backend(cpu, "tf32"))
        assert seen == ["tf32"] * 3

    def test_kernels_agree(self):
        W, G, mask = normal(37, 40), damp_by(gram(40)), random_mask(37, 40)
        fit, other = run(W, G, mask, 2), run(W, G, mask, 2, backend=TRITON)
        torch.testing.assert_close(other.Z, fit.Z, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.error, fit.error, rtol=1e-5, atol=0)


class TestTakeBetter:
    def test_rows_with_the_lower_error(self):
        """A row with an equal error stays; NaN is never better."""

        def fit(value, errors):
            full = torch.full((4, 3), float(value))
            return Fit(full > 1, full.clone(), 10 * full, torch.tensor(errors))

        one, two = fit(1, [1.0, 1.0, 1.0, 1.0]), fit(2, [2.0, 1.0, 0.5, torch.nan])
        better = one.take_better(two)
        assert better.tolist() == [False, False, True, False]
        assert one.Z[:, 0].tolist() == [1, 1, 2, 1]
        assert one.R[:, 2].tolist() == [10, 10, 20, 10]
        assert one.mask.any(1).tolist() == [False, False, True, False]
        assert one.error.tolist() == [1, 1, 0.5, 1]
        assert two.Z.unique().tolist() == [2]
