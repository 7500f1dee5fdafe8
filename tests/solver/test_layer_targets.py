"""Layers with a cross matrix: their targets are pruned in place of their weights."""

from dataclasses import replace

import pytest
import torch
from helpers.kernel_inputs import generator
from helpers.layer_inputs import ERRORS, PATTERNS, ROWS, D, assert_same, error, make_gram, make_layers, run, settings

from sparsefw.kernels import cpu
from sparsefw.solver import layer
from sparsefw.solver.layer import BYTES_PER_ENTRY, ROW_UNIT, prune_layers
from sparsefw.solver.objective import damped
from sparsefw.solver.target import target


class TestTargets:
    """Layers with a cross matrix: their targets are pruned in place of their weights."""

    def crosses(self, layers=ROWS, d=D):
        return [200 * torch.randn(n, d, generator=generator(50 + i)) for i, n in enumerate(layers)]

    @pytest.mark.parametrize("text", PATTERNS)
    def test_pruned_in_place_of_the_weights(self, text):
        """As pruning the target by itself; a layer without a cross matrix in the same stack is its own target."""
        layers, how, G = make_layers(dtype=torch.float32), settings(text), make_gram()
        crosses = self.crosses()
        targets = [
            (name, target(W, damped(G, how.damp), B.clone(), layer.TARGET_STEPS, ops=cpu))
            for (name, W), B in zip(layers, crosses, strict=True)
        ]
        targets[2], crosses[2] = layers[2], None
        assert all((T - W).abs().max() > 0.1 for (_, T), (_, W) in zip(targets, layers, strict=True) if T is not W)
        found, expected = run(layers, G, how=how, crosses=crosses), run(targets, G, how=how)
        assert [row.target for row in found[1]] == ["dense", "dense", "layer", "dense"]
        for name, Z in expected[0].items():
            assert torch.equal(found[0][name] != 0, Z != 0)
            torch.testing.assert_close(found[0][name], Z, rtol=1e-4, atol=1e-4)
        for a, b in zip(found[1], expected[1], strict=True):
            assert [getattr(a, e) for e in ERRORS] == pytest.approx([getattr(b, e) for e in ERRORS], rel=1e-3)

    @pytest.mark.parametrize("text", PATTERNS)
    def test_masks_of_unchanged_weights_are_chosen_for_them(self, text):
        how = settings(text, refit=0, swaps=20, alpha=0.0)
        layers, G = make_layers(dtype=torch.float32), make_gram()
        crosses = self.crosses()
        crosses[2] = None
        pruned, results = run(layers, G, how=how, crosses=[B if B is None else B.clone() for B in crosses])
        for_itself, _ = run(layers, G, how=how)
        for (name, W), B, row in zip(layers, crosses, results, strict=True):
            T = W
            if B is not None:
                T = target(W, damped(G, how.damp), B.clone(), layer.TARGET_STEPS, ops=cpu)
            Z = pruned[name]
            assert torch.equal(Z, W * (Z != 0))
            assert row.error == row.error_mask == pytest.approx(error(T, Z, G).sum().item(), rel=1e-4)
            assert row.target == ("layer" if B is None else "dense")
            if B is None:
                assert torch.equal(Z, for_itself[name])
            elif len(W) > 1:
                assert row.error < error(T, for_itself[name], G).sum().item()

    @pytest.mark.parametrize("refit_steps", [0, 3])
    @pytest.mark.parametrize("text", PATTERNS)
    def test_stacks_and_chunks_change_nothing(self, text, refit_steps):
        layers, how = make_layers(), settings(text, refit=refit_steps, swaps=0 if refit_steps else 20)
        unit = BYTES_PER_ENTRY * D * ROW_UNIT
        together, small = (
            run(layers, how=replace(how, memory=memory), crosses=self.crosses()) for memory in (1 << 40, unit)
        )
        assert_same(together, small)
        alone = [run([layer], how=how, crosses=[B]) for layer, B in zip(layers, self.crosses(), strict=True)]
        assert_same(
            together, ({n: W for one, _ in alone for n, W in one.items()}, [r for _, one in alone for r in one])
        )

    def test_gram_matrix_stays(self):
        G = make_gram()
        before = G.clone()
        list(prune_layers(make_layers(), G, "sparsefw", settings(), cpu, crosses=self.crosses()))
        assert torch.equal(G, before)
