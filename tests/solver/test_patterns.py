"""Sparsity patterns: what is accepted, and the exact numbers of kept weights that follow."""

import pytest
import torch

from sparsefw.errors import InputError
from sparsefw.solver import patterns


@pytest.mark.parametrize(
    ("text", "d", "kept"),
    [("0.6", 576, 231), ("0.6", 10, 4), ("0.29", 100, 71), ("0.7", 10, 3), (".5", 7, 4), ("0.999", 5, 1)],
)
def test_kept_in_a_row_is_exact(text, d, kept):
    """0.29 * 100 is 28.999... in floating point, and yet 29 are removed."""
    assert patterns.kept_in_row(patterns.parse(text), d) == kept


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "3:5", "31:32"])
def test_groups(text):
    pattern = patterns.parse(text)
    n, m = map(int, text.split(":"))
    assert (patterns.kept_in_group(pattern), pattern.group, pattern.scope) == (n, m, "group")
    assert patterns.kept_in_row(pattern, 3 * m) == 3 * n


def test_a_layers_budget_goes_to_its_most_salient_entries():
    saliency = torch.tensor([[9.0, 8, 7, 6, 5], [4, 3, 2, 1, 0]])
    assert patterns.kept(patterns.parse("layer:0.4"), saliency).tolist() == [5, 1]
    assert patterns.kept_in_layer(patterns.parse("layer:0.29"), 10, 10) == 71


@pytest.mark.parametrize("text", ["0", "1", "0.0", "1.5", "layer:1", "60"])
def test_fraction_outside_zero_and_one(text):
    with pytest.raises(InputError, match=f"--sparsity {text}: the fraction removed lies between"):
        patterns.parse(text)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "2:64"])
def test_bad_groups(text):
    with pytest.raises(InputError, match=f"--sparsity {text}: n:m keeps n of every m"):
        patterns.parse(text)


@pytest.mark.parametrize("text", ["", ".", "layer:", "-0.5", "nan", "2:4:8", "0.6x", "1e-1", "row:0.5", "٢:٤", "0.5\n"])
def test_not_a_pattern(text):
    with pytest.raises(InputError, match="expected a fraction"):
        patterns.parse(text)


def test_width_that_does_not_divide():
    with pytest.raises(InputError, match=r"mlp\.up: 30 inputs do not divide into groups of 4 \(--sparsity 2:4\)"):
        patterns.check_width(patterns.parse("2:4"), 30, "mlp.up")
    patterns.check_width(patterns.parse("0.5"), 30, "mlp.up")
