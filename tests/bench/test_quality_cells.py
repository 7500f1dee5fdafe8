"""Cells of the quality study: which there are, which are missing or to be run again, and what is printed of them."""

import pytest
import quality_baselines
import quality_cells
import quality_results
import texts
from quality_cells import (
    DEFAULT,
    LAYERWISE,
    MASKS,
    MEASURED_AT,
    METHODS_OF_TABLE,
    NSAMPLES,
    OWN,
    PAPER,
    PAPER_SHORT,
    REFERENCE,
    ROWS_OF_SEEDS,
    ROWS_OF_WINDOWS,
    SPARSEGPT,
    UNRECONSTRUCTED,
    WANDA,
    Cell,
    select,
)
from quality_tables import tables

from sparsefw.solver import METHODS
from sparsefw.solver.config import WITH_REFIT


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The benchmark's methods, for the time of a test."""
    for name, method in quality_baselines.BASELINES.items():
        monkeypatch.setitem(METHODS, name, method)


def entry(cell, perplexity=10.0, **changes):
    """A hand-made cell of the results, as far as tables and the choice of cells need it."""
    on_texts = {"a.txt": perplexity, "b.txt": 2 * perplexity, texts.TEST: 3 * perplexity}
    settings = quality_cells.resolved([*cell.flags, "--sparsity", cell.pattern], cell.nsamples)
    made = {"method": cell.method, "nsamples": cell.nsamples, "arguments": settings}
    made |= {"seconds": {"calibrate": 100.0, "solve": 61.4}}
    relative = {"relative_mask": 0.5, "relative_error": 0.25, "warm_start": "wanda"}
    return made | relative | {"perplexity": on_texts, "dense": dict.fromkeys(on_texts, 9.0)} | changes


def results_of(cells, **changes):
    return {"cells": {cell.key: entry(cell, **changes) for cell in cells}}


class TestCells:
    def test_methods_at_every_pattern(self):
        cells = select(seeds=[0, 3], nsamples=[8, 64])
        assert len({cell.key for cell in cells}) == len(cells) == 4 * 5 * len(METHODS_OF_TABLE)
        assert {cell.pattern for cell in cells} == {"0.5", "0.6", "0.7", "2:4", "4:8"}
        assert {(cell.seed, cell.nsamples) for cell in cells} == {(0, 8), (0, 64), (3, 8), (3, 64)}

    def test_everything(self):
        """Most rows at all patterns, some with further seeds, with more windows, or calibrated on the reference."""
        cells = quality_cells.cells_of_everything()
        assert len({cell.key for cell in cells}) == len(cells)
        own = [cell for cell in cells if cell.calibrated_on == OWN and cell.nsamples == NSAMPLES]
        for method in METHODS_OF_TABLE:
            found = [(cell.pattern, cell.seed) for cell in own if cell.method == method]
            wanted = [(pattern, 0) for pattern in MEASURED_AT.get(method, ("0.5", "0.6", "0.7", "2:4", "4:8"))]
            if method in ROWS_OF_SEEDS:
                wanted += [(pattern, seed) for pattern in ("0.6", "2:4") for seed in (1, 2)]
            assert sorted(found) == sorted(wanted)
        assert not set(ROWS_OF_SEEDS) & set(MEASURED_AT)
        assert set(MEASURED_AT) <= set(METHODS_OF_TABLE)
        on_reference = [(cell.method, cell.pattern) for cell in cells if cell.calibrated_on == REFERENCE]
        assert on_reference == [(method, "0.6") for method in (WANDA, SPARSEGPT, DEFAULT)]
        of_windows = [(cell.method, cell.pattern, cell.nsamples) for cell in cells if cell.nsamples != NSAMPLES]
        assert of_windows == [(method, "0.6", 256) for method in ROWS_OF_WINDOWS]
        assert len(cells) == len(own) + len(on_reference) + len(of_windows)
        assert not any(cell.tuning for cell in cells)

    def test_selection(self):
        """A name is that method, though others contain it; other text is looked for in all names."""
        for only, methods in {PAPER: [PAPER], "--preset": [PAPER_SHORT, PAPER], "none of them": []}.items():
            cells = select(only=only, wanted=["2:4"])
            assert [(cell.method, cell.pattern) for cell in cells] == [(method, "2:4") for method in methods]

    def test_settings(self):
        cells = select(settings=True)
        assert len({cell.key for cell in cells}) == len(cells)
        assert all(cell.tuning for cell in cells)
        for base in (MASKS, UNRECONSTRUCTED):
            own = [cell for cell in cells if cell.method.startswith(base)]
            varied = [cell.method.removeprefix(f"{base}, ") for cell in own if cell.pattern == "0.6"]
            alphas = {name for name in varied if name.startswith("alpha")}
            # One of the five values is the base's own.
            assert len(alphas) == 4
            assert {"penalty 0", "steps 20", "steps 30", "steps 60", base} <= set(varied)
            # The whole penalty is the default where weights are not refitted.
            assert ("penalty 1" in varied) == (base != MASKS)
            assert [c.method for c in own if c.pattern == "layer:0.6"] == [base]
        assert [c.method for c in cells if "SparseGPT" in c.method] == ["SparseGPT"]

    @pytest.mark.parametrize("settings", [False, True])
    def test_flags_are_those_of_the_command_line(self, settings):
        for cell in select(settings=settings):
            config = quality_cells.config_of([*cell.flags, "--sparsity", cell.pattern])
            assert config.sparsity == cell.pattern
            if cell.method.startswith(MASKS):
                assert config.refit == 0
            if "alpha 0.9" in cell.method:
                assert config.alpha == 0.9

    def test_settings_of_frank_wolfe_are_nothing_to_other_methods(self):
        """A new setting of Frank-Wolfe does not make cells of other methods run again."""
        assert set(quality_cells.resolved(["--method", "wanda"])) == {"method"}
        assert {"steps", "alpha", "refit", "damp"} <= set(quality_cells.resolved([]))

    def test_a_setting_of_every_method_counts_once_it_is_on(self):
        on = quality_cells.resolved(["--method", "wanda", "--keep-zeros"])
        assert on == {"method": "wanda", "keep_zeros": True}


class TestMissing:
    def missing(self, results, cells, held_out=("a.txt", "b.txt")):
        return quality_results.missing(results, cells, held_out)

    def test_a_changed_default_is_run_again(self, monkeypatch):
        cells = select(only=DEFAULT, wanted=["0.5", "0.6"])
        results = results_of(cells[:1])
        assert self.missing(results, cells) == cells[1:]
        monkeypatch.setitem(WITH_REFIT["sparsefw"], "penalty", 0.3)
        assert self.missing(results, cells) == cells

    def test_a_cell_of_other_code_is_there(self):
        cells = select(only="RIA")
        assert self.missing(results_of(cells, commit="abc"), cells) == []
        assert self.missing(results_of(cells), cells) == []

    def test_a_cell_without_a_text_is_run_again(self):
        (cell,) = cells = select(only="RIA", wanted=["0.6"])
        assert self.missing(results_of(cells), cells, ("a.txt", "c.txt")) == cells
        results = results_of(cells)
        del results["cells"][cell.key]["perplexity"][texts.TEST]
        assert self.missing(results, cells) == cells
        # Cells that a setting is chosen by do not look at the reference.
        tuning = [Cell(cell.method, cell.flags, "0.6", tuning=True)]
        assert self.missing(results, tuning) == []

    def test_calibration_on_the_reference_is_another_cell(self):
        cells = [Cell("RIA", ("--method", "ria"), "0.6", calibrated_on=on) for on in (OWN, REFERENCE)]
        assert self.missing(results_of(cells[:1]), cells) == cells[1:]

    def test_again(self):
        """Cells of a commit, or of all but the present one, whose cells are never run again."""
        cells = select(only="RIA")[:4]
        results = results_of(cells)
        for cell, commit in zip(cells[1:], ("abc1", "abd2", "new"), strict=True):
            results["cells"][cell.key]["commit"] = commit
        wanted = [*cells, *select(only="Wanda")]

        def again(commit):
            return quality_results.made_by(results, wanted, commit, present="new")

        assert again("all") == cells[:3]
        assert again("abc") == cells[1:2]
        assert again("ab") == cells[1:3]
        assert again(quality_results.BEFORE_COMMITS) == cells[:1]
        assert again("new") == []

    def test_remaining_time(self):
        """A method's own mean, else that of all methods; cells that shared a run are not looked at."""
        ria, wanda = select(only="RIA"), select(only=WANDA, wanted=["0.6"])
        results = results_of(ria[:2], seconds={"calibrate": 3000.0, "solve": 600.0})
        results["cells"][wanda[0].key] = entry(wanda[0], seconds={"calibrate": 3600.0 * 3 - 1, "solve": 1.0})
        results["cells"]["shared"] = entry(wanda[0], seconds={"solve": 1.0})
        magnitude = select(only="magnitude", wanted=["0.6"])
        lines = quality_results.remaining(results, [*ria[2:], *magnitude], 9).splitlines()
        assert lines[0] == "4 of 9 cells are to be run."
        # Three of an hour, and one of the mean of one and three.
        assert lines[1].startswith("About 5.0 hours")
        assert lines[2].endswith(": magnitude.")
        assert quality_results.remaining(results, [], 9) == "0 of 9 cells are to be run."
        four_times = select(only="RIA", wanted=["0.6"], nsamples=[256])
        assert quality_results.remaining(results, four_times, 1).splitlines()[1].startswith("About 4.0 hours")


class TestTable:
    def test_rows(self):
        (ria,), (refitted,) = (select(wanted=["0.6"], only=name) for name in ("RIA", LAYERWISE))
        found = [entry(ria, 1690.04, warm_start="ria"), entry(refitted, 40.0, commit="abc+")]
        for one in found:
            del one["perplexity"][texts.TEST], one["dense"][texts.TEST]
        results = {"cells": dict(zip((ria.key, refitted.key), found, strict=True))}
        table = tables(results, select())
        assert table.splitlines()[0] == "Sparsity 0.6, 64 calibration windows"
        assert table.splitlines()[2:] == [
            "| method | perplexity, a.txt | perplexity, b.txt | mask only | relative error | seconds | commit |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            "| dense | 9.00 | 9.00 | | | | |",
            "| RIA | 1690.04 | 3380.08 | | | 61 | before 2026-11 |",
            f"| {LAYERWISE} | 40.00 | 80.00 | 0.500 | 0.250 | 61 | abc+ |",
        ]

    def test_a_text_that_a_cell_lacks_is_empty(self):
        cells = [*select(wanted=["0.6"], only="ADMM"), *select(wanted=["0.6"], only=LAYERWISE)]
        results = results_of(cells)
        del results["cells"][cells[0].key]["perplexity"][texts.TEST]
        of_admm, of_refitted = tables(results, cells).splitlines()[-2:]
        assert of_admm.startswith("| ADMM | 10.00 | 20.00 | | 0.500 |")
        assert of_refitted.startswith(f"| {LAYERWISE} | 10.00 | 20.00 | 30.00 | 0.500 |")

    def test_a_table_for_each_pattern_size_and_calibration(self):
        cells = select(only="RIA", wanted=["0.6", "2:4"], nsamples=[8, 64])
        cells.append(Cell("RIA", ("--method", "ria"), "0.6", calibrated_on=REFERENCE))
        printed = tables(results_of(cells), cells).split("\n\nSparsity ")
        assert len(printed) == 5
        assert printed[-1].startswith("0.6, 64 calibration windows of the reference\n")
        assert tables({"cells": {}}, cells) == ""

    def test_seeds_are_averaged_and_commits_listed(self):
        cells = select(only="RIA", wanted=["0.6"], seeds=[0, 1, 2])
        found = [entry(cell, x, commit=c) for cell, x, c in zip(cells, (10.0, 11.0, 15.0), "aba", strict=True)]
        results = {"cells": {cell.key: one for cell, one in zip(cells, found, strict=True)}}
        row = tables(results, cells).splitlines()[-1]
        assert row.startswith("| RIA | 12.00 (5.00) | 24.00 (10.00) | 36.00 (15.00) | 0.500 (0.000) | 0.250 (0.000) |")
        assert row.endswith("| 61 (0) | a, b |")
