"""The quality study predicts from its cells."""

import math

import tables


def test_a_line_predicts_what_more_tokens_gain():
    """Where the logarithms of ratios are a power of the tokens, it is exact."""
    cells = {f"start + {n:,} | 2:4": {"ratio": math.exp(3 / n**0.1)} for n in (10, 1000, 32768)}
    *_, row = tables.predictions({"start | 2:4": {"ratio": 9.0}, **cells}).splitlines()
    assert row.startswith("| start, 2:4 |")
    assert row.endswith(f"| {math.exp(3 / 10**0.8):.2f} |")
