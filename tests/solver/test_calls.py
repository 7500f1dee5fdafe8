"""The calls that `calls` counts are the calls of a solve."""

import pytest
from helpers.counting import counting
from helpers.layer_inputs import make_crosses, make_gram, make_layers

from sparsefw.solver import METHODS, PruneConfig, prune_layers
from sparsefw.solver.calls import calls


def config(**options):
    return PruneConfig(**(dict(kernel="torch", precision="ieee") | options))


@pytest.mark.parametrize(
    "options",
    [{}, dict(refit=0), dict(refit=0, target="dense"), dict(preset="paper", steps=9), dict(rounds=0), dict(steps=0),
     dict(steps=1), dict(alpha=0.5), dict(target="layer"), dict(sparsity="2:4"), dict(swaps=5),
     dict(steps=7, refit=2, rounds=1), dict(damp=0), dict(keep_zeros=True), dict(method="wanda"), dict(method="ria"),
     dict(method="magnitude"), dict(method="sparsegpt")],
    ids=str,
)  # fmt: skip
def test_calls_of_a_solve_are_those_that_are_made(options):
    how = config(**options)
    backend, seen = counting()
    layers = make_layers((40, 24))
    crosses = make_crosses((40, 24)) if how.uses_dense_target else None
    solves = 1 if METHODS[how.method].rows_independent else len(layers)
    list(prune_layers(layers, make_gram(), how.method, how, backend, crosses=crosses))
    expected = calls(how.method, how, how.uses_dense_target)
    assert seen["product"] == solves * expected.products
    assert seen["row_step"] == solves * expected.row_steps
    assert seen["lmo"] == solves * expected.lmos
    assert seen["round_mask"] == solves * expected.roundings
    assert seen["row_swaps"] == solves * expected.row_swaps
    assert seen["conjugate_step"] == solves * sum(count * (steps + 1) for count, steps, _ in expected.descents)


def test_what_the_readme_says_of_products():
    default, masks = calls("sparsefw", config(), True), calls("sparsefw", config(refit=0), False)
    alone = calls("sparsefw", config(reconstruct=0), True)
    assert (default.steps, default.target, default.products) == (16, 4, 16 + 4 + 15 + 4)
    assert (alone.steps, alone.target, alone.products) == (32, 4, 32 + 4 + 25 + 4)
    assert (masks.steps, masks.products) == (40, 44)
