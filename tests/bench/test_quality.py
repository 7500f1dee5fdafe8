"""The quality study: a cell and the settings from end to end, its tables, its texts and its baselines."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import baselines
import pytest
import quality
import quality_cells
import quality_settings
import quality_tables
import texts
from helpers.families import save_model

import sparsefw.run
from sparsefw.solver.config import METHODS
from sparsefw.solver.methods import CHOOSE

REPO = Path(quality.__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The benchmark's methods, for the time of a test."""
    for name, (method, choose) in baselines.BASELINES.items():
        monkeypatch.setitem(METHODS, name, method)
        monkeypatch.setitem(CHOOSE, name, choose)


def test_documents_have_the_committed_numbers():
    pages = "".join((REPO / page).read_text().replace("**", "") for page in ("README.md", "docs/results.md"))
    printed = quality_tables.tables(quality.load(quality.RESULTS))
    rows = [line for line in printed.splitlines() if re.search(r"\| .*\d\.\d", line)]
    assert len(rows) > 50
    # A page may leave out what has no number.
    assert [row for row in rows if row not in pages] == []


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    """A cell and the settings run once; no path of the machine gets into the results."""
    model = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
    own = [tmp_path / name for name in ("calibration.txt", "wiki_test.txt", "news.txt")]
    for n, path in enumerate(own):
        path.write_text("".join(f"{i}: a rose is a rose is a rose, {(n + i) % 7} times.\n" for i in range(100)))
    results, ran = tmp_path / "results.json", []
    for module in (quality, quality_settings):
        monkeypatch.setattr(module, "SEQLEN", 32)
        monkeypatch.setattr(module, "EVAL_WINDOWS", 2)
    cell = quality_cells.Cell("ADMM", "2:4", nsamples=8)
    monkeypatch.setattr(quality, "cells", lambda: [cell])

    def launch(flags):
        ran.append(flags)
        return sparsefw.run.main(flags)

    def run(*flags):
        quality.main([*map(str, own), "--model", str(model), "--results", str(results), *flags], launch)
        return json.loads(results.read_text())

    written = run()
    assert run() == written
    assert len(ran) == 1
    assert not re.search(re.escape(str(tmp_path)) + r"|/tmp|/home|/root", results.read_text())
    entry = written["cells"][cell.key]
    assert list(entry["perplexity"]) == list(entry["dense"]) == ["wiki_test.txt", "news.txt", texts.TEST]
    assert {len(column) for column in entry["layers"].values()} == {2 * 7}
    assert 0 < entry["relative_error"] < 1
    monkeypatch.setattr(quality, "commit", lambda: "another")
    assert run("--again")["cells"][cell.key]["commit"] == "another"
    assert len(ran) == 2
    monkeypatch.setattr(quality_settings, "SAMPLE_ROWS", 2)
    monkeypatch.setattr(quality_settings, "VARIED", {quality_settings.MASKS: "--damp 0.4"})
    monkeypatch.setattr(quality_settings, "PATTERNS", ("0.5", "2:4"))
    measured = run("--settings", "0,1")["settings"]["0,1"]
    assert {len(errors) for rows in measured.values() for errors in rows.values()} == {3}
    assert "| `--refit 0 --damp 0.4` | " in capsys.readouterr().out
    own[2].write_text("something else")
    with pytest.raises(SystemExit, match=r"news.txt: the results are of another text"):
        run()


def test_a_failed_cell_ends_the_study(tmp_path):
    cell = quality_cells.Cell("RIA", "0.6")
    with pytest.raises(SystemExit, match=r"RIA \| 0.6 .*exit status 2"):
        quality.run_cell(cell, tmp_path, tmp_path, [], tmp_path, lambda flags: 2)


def test_the_parts_of_the_reference_share_no_run_of_words():
    calibration, test = texts.split(topics)
    assert texts.runs(calibration).isdisjoint(texts.runs(test))
    # 64 windows of 512 tokens to calibrate on, 20 to test on, a token of at most 4 characters.
    assert len(calibration) > 64 * 512 * 4
    assert len(test) > 20 * 512 * 4
