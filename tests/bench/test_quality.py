"""The quality study measures a cell once, and its pages have the figures of the results files."""

import json
import re

import pytest
import quality


@pytest.mark.slow
def test_a_cell_of_the_quality_study(tmp_path, capsys):
    """It is pruned, recovered and evaluated, and not measured again."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} is a number, and so is {n * n}.\n" for n in range(3000)))
    results = tmp_path / "results.json"
    options = ["--tiny", "--results", str(results), "--only", "the default | 0.6"]
    arguments = [str(tmp_path), str(text), str(text), *options]
    quality.main(arguments)
    assert re.search(r"\| the default \| \d+\.\d", capsys.readouterr().out)
    cells = json.loads(results.read_text())["cells"]
    assert cells.keys() == {"dense | 0.6", "the default | 0.6"}
    assert cells["dense | 0.6"]["ratio"] == 1
    written = results.stat().st_mtime_ns
    quality.main(arguments)
    assert results.stat().st_mtime_ns == written


def test_the_page_has_the_figures_of_the_results(capsys):
    for name in ("near-texts", "far-texts"):
        quality.main(["--table", "--results", str(quality.REPO / f"bench/results/{name}.json")])
    printed = capsys.readouterr().out.splitlines()
    page = (quality.REPO / "docs/results.md").read_text().replace("**", "")
    rows = [line for line in page.splitlines() if re.match(r"\| .*\d\.\d", line)]
    assert len(rows) > 50
    assert [row for row in rows if row not in printed] == []
