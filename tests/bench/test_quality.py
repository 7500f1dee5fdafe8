"""The quality study measures a cell once, and makes tables of its cells."""

import json
import math
import re

import pytest
import quality
import tables


@pytest.mark.slow
def test_a_cell_of_the_quality_study(tmp_path, monkeypatch):
    """It is pruned, recovered and evaluated, and not measured again."""
    monkeypatch.setitem(quality.CURVE, "Wanda + 999", "--method wanda then --recover 999")
    text, results = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text("One number is small, and another one is large.\n" * 3000)
    options = ["--model", "tiny", "--curve", "--only", "Wanda + 999 | 0.6", "--results", str(results)]
    quality.main([str(tmp_path), str(text), str(text), *options])
    cells = json.loads(results.read_text())["cells"]
    assert cells.keys() == {"dense", "Wanda + 999 | 0.6"}
    assert re.search(r"\| Wanda \+ 999, 0.6 \| mask, recovery \| \d+\.\d \|", tables.curve(cells))
    monkeypatch.setattr(quality, "measured", None)
    quality.main([str(tmp_path), str(text), str(text), *options])


def test_a_line_predicts_what_more_tokens_gain():
    """Where the logarithms of ratios are a power of the tokens, it is exact."""
    cells = {f"start + {n:,} | 2:4": {"ratio": math.exp(3 / n**0.1)} for n in (10, 1000, 32768)}
    *_, row = tables.predictions({"start | 2:4": {"ratio": 9.0}, **cells}).splitlines()
    assert row.startswith("| start, 2:4 |")
    assert row.endswith(f"| {math.exp(3 / 10**0.8):.2f} |")
