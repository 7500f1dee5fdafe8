"""Sparsity patterns: what is accepted, and the exact numbers of kept weights that follow."""

import pytest
import torch
from helpers.checkpoints import refused

from sparsefw import PruneConfig, solve_layer
from sparsefw.solver import patterns


@pytest.mark.parametrize(
    ("text", "d", "kept"),
    [("0.6", 576, 231), ("0.29", 100, 71), ("0.7", 10, 3), (".5", 7, 4), ("0.999", 5, 1), ("3:5", 15, 9)],
)
def test_kept_in_a_row_is_exact(text, d, kept):
    """0.29 * 100 is 28.999... in floating point, and yet 29 are removed."""
    assert patterns.parse(text).kept(d) == kept


@pytest.mark.parametrize("text", ["2:4", "1:2", "31:32"])
def test_groups(text):
    pattern, (n, m) = patterns.parse(text), map(int, text.split(":"))
    assert (pattern.kept(m), pattern.group, pattern.scope) == (n, m, "group")
    patterns.check_width(pattern, 3 * m, "mlp.up")
    with refused(rf"mlp\.up: {m + 1} inputs do not divide into groups of {m}"):
        patterns.check_width(pattern, m + 1, "mlp.up")


def test_a_layers_budget_goes_to_its_most_salient_entries():
    saliency = torch.tensor([[9.0, 8, 7, 6, 5], [4, 3, 2, 1, 0]])
    mask, _, _ = solve_layer(saliency, torch.eye(5), PruneConfig("layer:0.4", "magnitude", kernel="torch"))
    assert mask.sum(1).tolist() == [5, 1]
    assert patterns.parse("layer:0.29").kept(100) == 71


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (("0", "1", "1.5", "layer:1", "60"), "expected a fraction between 0 and 1"),
        (("4:4", "5:4", "0:4", "2:64"), "n:m keeps n of every m"),
        (("", ".", "layer:", "-0.5", "nan", "2:4:8", "1e-1", "row:0.5", "٢:٤", "0.5\n"), "expected a fraction"),
    ],
)
def test_refused(texts, match):
    for text in texts:
        with refused(match):
            patterns.parse(text)
