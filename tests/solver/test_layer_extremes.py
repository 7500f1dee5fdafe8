"""One layer whose numbers are not finite, or too large to stay so; and tensors that record gradients."""

import math

import pytest
import torch
from helpers.kernel_inputs import generator
from helpers.layer_inputs import PATTERNS, D, make_config, make_gram, make_layers

from sparsefw.solver import METHODS, PruneConfig, solve_layer


def config_of(method, text="0.6", **options):
    return make_config(text, **options) if method == "sparsefw" else PruneConfig(text, method)


class TestNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("where", ["W", "G"])
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("method", METHODS)
    def test_whatever_the_pattern(self, method, text, where, value):
        inputs = {"W": make_layers((3,))[0][1], "G": make_gram()}
        inputs[where][1, 2] = inputs[where][2, 1] = value
        with pytest.raises(FloatingPointError, match=r"^mine: .*(not finite|NaN or Inf)"):
            solve_layer(**inputs, config=config_of(method, text), name="mine")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("options", [{"refit": 0}, {"refit": 2}, {"refit": 0, "swaps": 3}, {"preset": "paper"}])
    def test_a_weight_that_the_warm_start_keeps(self, options, text, value):
        """Without a step, no error depends on it."""
        W = make_layers((3,))[0][1]
        W[1, 3] = value
        config = PruneConfig(text, steps=0, kernel="torch", precision="ieee", **options)
        with pytest.raises(FloatingPointError, match=r"^mine: .*(not finite|NaN or Inf)"):
            solve_layer(W, make_gram(), config, name="mine")

    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("refit", [0, 3])
    def test_cross_matrix(self, refit, text):
        B = torch.randn(3, D, generator=generator(50))
        B[1, 2] = math.nan
        with pytest.raises(FloatingPointError, match=r"^mine: .*not finite"):
            solve_layer(make_layers((3,))[0][1], make_gram(), make_config(text, refit=refit), name="mine", B=B)


class TestTooLarge:
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("method", METHODS)
    def test_for_errors(self, method, text):
        W = 1e30 * make_layers((3,), dtype=torch.float32)[0][1]
        with pytest.raises(FloatingPointError, match=r"^mine: .*too large"):
            solve_layer(W, make_gram(), config_of(method, text), name="mine")

    @pytest.mark.parametrize("text", PATTERNS)
    def test_for_the_sweep_of_sparsegpt(self, text):
        """What overflows reaches the columns whose mask is chosen later."""
        W = 1e38 * torch.rand(3, 2 * 128 + D, generator=generator(1))
        with pytest.raises(FloatingPointError, match=r"^mine: .*too large"):
            solve_layer(W, make_gram(W.shape[1]), PruneConfig(text, "sparsegpt"), name="mine")

    def test_for_the_dtype_of_updated_weights(self):
        """Kept weights grow where they make up for others."""
        W = torch.full((3, D), 6e4, dtype=torch.float16)
        with pytest.raises(FloatingPointError, match=r"^mine: .*too large"):
            solve_layer(W, torch.ones(D, D) + torch.eye(D), PruneConfig("0.6", "sparsegpt"), name="mine")
        # Refits are only taken where they are better.
        _, Z, result = solve_layer(W, torch.ones(D, D) + torch.eye(D), make_config("0.6"))
        assert Z.isfinite().all()
        assert result.error <= result.error_warm_start


class TestRelativeErrors:
    def test_of_a_warm_start_without_error(self):
        """Wanda loses nothing of these rows; SparseGPT has a budget for each block of columns."""
        W = torch.zeros(3, 256)
        W[:, :64] = torch.randn(3, 64, generator=generator(2))
        G = make_gram(256)
        for method in METHODS:
            _, _, result = solve_layer(W, G, PruneConfig("0.6", method))
            assert result.error_warm_start == 0
            expected = math.inf if method == "sparsegpt" else 1.0
            assert (result.error > 0) == (method == "sparsegpt")
            assert (result.relative_mask, result.relative_error) == (expected, expected)


class TestGradients:
    @pytest.mark.parametrize("method", ["sparsefw", "sparsegpt"])
    @pytest.mark.parametrize("text", PATTERNS)
    def test_recorded_ones_change_nothing(self, text, method):
        """As of inputs that a hook has recorded in a forward pass."""
        W, G = make_layers((37,), dtype=torch.float32)[0][1], make_gram()
        B = 200 * torch.randn(37, D, generator=generator(50)) if method == "sparsefw" else None
        expected = solve_layer(W, G, config_of(method, text), B=B)
        recorded = [None if x is None else x.clone().requires_grad_() for x in (W, G, B)]
        mask, Z, _ = solve_layer(recorded[0], recorded[1], config_of(method, text), B=recorded[2])
        assert torch.equal(mask, expected[0])
        assert torch.equal(Z, expected[1])
        assert not Z.requires_grad
