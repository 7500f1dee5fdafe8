"""Layers with a cross matrix: their targets are pruned in place of their weights."""

import pytest
import torch
from helpers.layer_inputs import (
    ERRORS,
    PATTERNS,
    D,
    assert_same,
    error,
    make_config,
    make_crosses,
    make_gram,
    make_layers,
    run,
    run_alone,
)

from sparsefw.kernels.backend import TORCH
from sparsefw.solver import prune_layers
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT
from sparsefw.solver.objective import damped
from sparsefw.solver.stack import TARGET_STEPS
from sparsefw.solver.target import find_target


class TestTargets:
    """Targets in stacks, with errors relative to them."""

    @pytest.mark.parametrize("text", PATTERNS)
    def test_pruned_in_place_of_the_weights(self, text):
        """The result is that of pruning the target by itself. A layer without a cross matrix is its own target."""
        layers, config, G = make_layers(dtype=torch.float32), make_config(text), make_gram()
        crosses = make_crosses()
        targets = [
            (name, find_target(W, damped(G, config.damp), cross.matrix.clone(), TARGET_STEPS))
            for (name, W), cross in zip(layers, crosses, strict=True)
        ]
        targets[2], crosses[2] = layers[2], None
        assert all((T - W).abs().max() > 0.1 for (_, T), (_, W) in zip(targets, layers, strict=True) if T is not W)
        found, expected = run(layers, G, config=config, crosses=crosses), run(targets, G, config=config)
        assert [row.target for row in found[1]] == ["dense", "dense", "layer", "dense"]
        for name, Z in expected[0].items():
            assert torch.equal(found[0][name] != 0, Z != 0)
            torch.testing.assert_close(found[0][name], Z, rtol=1e-4, atol=1e-4)
        for a, b in zip(found[1], expected[1], strict=True):
            assert [getattr(a, e) for e in ERRORS] == pytest.approx([getattr(b, e) for e in ERRORS], rel=1e-3)

    @pytest.mark.parametrize("text", PATTERNS)
    def test_masks_of_unchanged_weights_are_chosen_for_them(self, text):
        config = make_config(text, refit=0, swaps=20, alpha=0.0)
        layers, G = make_layers(dtype=torch.float32), make_gram()
        crosses = make_crosses()
        crosses[2] = None
        pruned, results = run(layers, G, config=config, crosses=crosses)
        for_itself, _ = run(layers, G, config=config)
        for (name, W), cross, row in zip(layers, crosses, results, strict=True):
            T = W
            if cross is not None:
                T = find_target(W, damped(G, config.damp), cross.matrix.clone(), TARGET_STEPS)
            Z = pruned[name]
            assert torch.equal(Z, W * (Z != 0))
            assert row.error == row.error_mask == pytest.approx(error(T, Z, G).sum().item(), rel=1e-4)
            assert row.target == ("layer" if cross is None else "dense")
            if cross is None:
                assert torch.equal(Z, for_itself[name])
            elif len(W) > 1:
                assert row.error < error(T, for_itself[name], G).sum().item()

    @pytest.mark.parametrize("refit_steps", [0, 3])
    @pytest.mark.parametrize("text", PATTERNS)
    def test_stacks_and_chunks_change_nothing(self, text, refit_steps):
        layers, config = make_layers(), make_config(text, refit=refit_steps, swaps=0 if refit_steps else 20)
        unit = BYTES_PER_ENTRY * D * ROW_UNIT
        together, small = (
            run(layers, config=config, memory=memory, crosses=make_crosses()) for memory in (1 << 40, unit)
        )
        assert_same(together, small)
        assert_same(together, run_alone(layers, config, make_crosses()))

    def test_gram_matrix_stays(self):
        G = make_gram()
        before = G.clone()
        list(prune_layers(make_layers(), G, "sparsefw", make_config(), TORCH, crosses=make_crosses()))
        assert torch.equal(G, before)
