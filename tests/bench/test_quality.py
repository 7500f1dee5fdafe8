"""The quality study measures a cell once, and its pages have the figures of the results files."""

import json
import math
import re

import pytest
import quality


@pytest.mark.slow
def test_a_cell_of_the_quality_study(tmp_path, capsys, monkeypatch):
    """It is pruned, recovered and evaluated, and not measured again."""
    monkeypatch.setitem(quality.CURVE, "the default + 999", "--recover 0 then --recover 999")
    text, results = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text("".join(f"{n} is a number, and so is {n * n}.\n" for n in range(3000)))
    options = ["--tiny", "--curve", "--only", "the default + 999 | 0.6", "--results", str(results)]
    quality.main([str(tmp_path), str(text), str(text), *options])
    assert re.search(r"\| the default \+ 999 \| \d+\.\d", capsys.readouterr().out)
    assert json.loads(results.read_text())["cells"].keys() == {"dense | 0.6", "the default + 999 | 0.6"}
    monkeypatch.setattr(quality, "measured", None)
    quality.main([str(tmp_path), str(text), str(text), *options])


def test_a_line_predicts_what_more_tokens_gain():
    """Where the logarithms of ratios are a power of the tokens, it is exact."""
    cells = {f"start + {n:,} | 2:4": {"ratio": math.exp(3 / n**0.1)} for n in (10, 1000, 32768)}
    ((name, found),) = quality.predictions({"start | 2:4": {"ratio": 9.0}, **cells}).items()
    assert (name, found["100,000,000"]) == ("start, 2:4", f"{math.exp(3 / 10**0.8):.2f}")


def test_the_page_has_the_figures_of_the_results(capsys):
    for name in ("near-texts", "far-texts", "curve"):
        quality.main(["--table", "--results", str(quality.REPO / f"bench/results/{name}.json")])
    printed = capsys.readouterr().out.splitlines()
    page = (quality.REPO / "docs/results.md").read_text().replace("**", "")
    rows = [line for line in page.splitlines() if re.match(r"\| .*\d\.\d", line)]
    assert len(rows) > 50
    assert [row for row in rows if row not in printed] == []
