"""Stacked rows have their own budget, saliency and target, and no row depends on the others."""

import pytest
import torch
from helpers.layer_inputs import PATTERNS, D, assert_same, make_config, make_gram, make_layers, run, run_alone

from sparsefw.solver import choices


class TestStack:
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("warm_start", ["wanda", "ria"])
    def test_like_each_layer_alone(self, text, warm_start):
        """RIA's saliency and a `layer:` budget depend on the whole layer."""
        layers, config = make_layers(), make_config(text, warm_start=warm_start)
        together = run(layers, config=config)
        assert_same(together, run_alone(layers, config))

    @pytest.mark.parametrize("refit", [0, 3])
    def test_each_layer_is_written_in_its_own_dtype(self, refit):
        """One of fp32 is not rounded to the fp16 of the layer before it."""
        layers, config = make_layers(dtype=torch.float32), make_config(refit=refit)
        dtypes = (torch.float16, torch.float32, torch.float32, torch.bfloat16)
        layers = [(name, W.to(dtype)) for (name, W), dtype in zip(layers, dtypes, strict=True)]
        together = run(layers, config=config)
        assert_same(together, run_alone(layers, config))
        assert [W.dtype for W in together[0].values()] == [*dtypes]

    def test_damping_is_that_of_the_config(self, monkeypatch):
        """Refits and final masks use the damped matrix; errors are on the matrix without damping."""
        G, seen = make_gram(), []

        def spy(function):
            def call(problem, *rest, **options):
                seen.append([None if x is None else x.diagonal() / G.diagonal() for x in (problem.G, problem.damped)])
                return function(problem, *rest, **options)

            return call

        monkeypatch.setattr(choices, "reselect", spy(choices.reselect))
        monkeypatch.setattr(choices.frank_wolfe, "solve", spy(choices.frank_wolfe.solve))
        run(make_layers((5,)), G, config=make_config(damp=0.5))
        run(make_layers((5,)), G, config=make_config(damp=0.3, refit=0))
        (mask, no_damping), (refitted, _), (measured, chosen_on) = seen
        assert no_damping is None
        torch.testing.assert_close(torch.stack([mask, measured]), torch.ones(2, D))
        torch.testing.assert_close(refitted, torch.full((D,), 1.5))
        torch.testing.assert_close(chosen_on, torch.full((D,), 1.3))
