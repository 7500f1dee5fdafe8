"""The tables in README.md and docs/results.md are those of the committed results."""

import re

import document_tables
import pytest
import quality_documents
import texts
from document_render import DENSE, Column, Table, changes_of_perplexity, perplexities, render, seconds, tflop
from quality_cells import REFERENCE, Cell
from quality_results import RESULTS, load


@pytest.fixture(scope="module")
def committed():
    return quality_documents.tables_of(load(RESULTS))


@pytest.mark.parametrize("page", quality_documents.DOCUMENTS, ids=lambda page: page.name)
def test_documents_have_the_committed_results(page, committed):
    text = page.read_text(encoding="utf-8")
    assert quality_documents.with_tables(text, committed) == text
    assert quality_documents.OPENED.search(text)


def test_every_table_with_numbers_stands_in_a_document(committed):
    documents = [page.read_text(encoding="utf-8") for page in quality_documents.DOCUMENTS]
    assert quality_documents.nowhere(documents, committed) == []


def results_of(*runs):
    """Results of (method, perplexity, changes of the entry or of the cell)."""
    cells = {}
    for method, perplexity, changes in runs:
        nsamples, on = changes.get("nsamples", 64), changes.get("calibrated_on", "own")
        cell = Cell(method, (), "0.6", changes.get("seed", 0), nsamples, on)
        entry = {"pattern": "0.6", "perplexity": {"a": perplexity, "b": 2 * perplexity}, "relative_error": 0.5}
        entry["arguments"] = {"method": "sparsefw"}
        cells[cell.key] = entry | {"dense": {"a": 1.0, "b": 2.0}} | changes
    return {"cells": cells}


class TestRender:
    def test_rows_columns_and_bold(self):
        """Rows and columns without a number are left out, a single cell without one is empty."""
        both, one = perplexities("a", "b"), perplexities("a")
        columns = {"both": Column("0.6", both), "none": Column("0.7", both), "seeds": Column("0.6", one, seeds=(0, 1))}
        table = Table({"dense": DENSE, "First": "x", "Second": "y", "Third": "z"}, columns, strong=("y",))
        results = results_of(("x", 3.14, {}), ("x", 4.0, {"seed": 1}), ("y", 5.0, {}))
        assert render(table, results).splitlines() == [
            "| | both | seeds |",
            "| --- | --- | --- |",
            "| dense | 1.0 / 2.0 | 1.0 |",
            "| First | 3.1 / 6.3 | 3.6 (0.9) |",
            "| **Second** | **5.0 / 10.0** | |",
        ]
        assert render(table, {"cells": {}}) == ""

    @pytest.mark.parametrize(
        ("method", "changes", "cell"),
        [
            ("sparsefw", {}, "3.5 (1.0)"),
            ("sparsefw", {"damp": 0.4}, ""),
            ("sparsefw", {"steps": 24}, ""),
            # It makes no such steps.
            ("sparsegpt", {"steps": 24}, "3.5 (1.0)"),
            ("sparsegpt", {"seed": 1, "dataset": "b", "reconstruct": 0}, "3.5 (1.0)"),
        ],
    )
    def test_seeds_are_averaged_if_their_settings_are_the_same(self, method, changes, cell):
        arguments = {"method": method, "damp": 0.1, "steps": 30, "seed": 0, "dataset": "a"}
        runs = ("x", 3.0, {"arguments": arguments}), ("x", 4.0, {"seed": 1, "arguments": arguments | changes})
        table = Table({"x": "x"}, {"seeds": Column("0.6", perplexities("a"), seeds=(0, 1))})
        assert render(table, results_of(*runs)).splitlines()[2:] == ([f"| x | {cell} |"] if cell else [])

    def test_a_text_that_is_missing_leaves_the_cell_empty(self):
        table = Table({"x": "x"}, {"c": Column("0.6", perplexities("a", "c"))})
        assert render(table, results_of(("x", 3.0, {}))) == ""

    @pytest.mark.parametrize("calibration", [{"calibrated_on": REFERENCE}, {"nsamples": 256}])
    def test_other_calibration_is_apart(self, calibration):
        columns = {"own": Column("0.6", perplexities("a")), "other": Column("0.6", perplexities("a"), **calibration)}
        results = results_of(("x", 3.0, {}), ("x", 4.0, calibration))
        assert render(Table({"x": "x"}, columns), results).splitlines()[-1] == "| x | 3.0 | 4.0 |"

    def test_changes_against_another_row(self):
        column = Column("0.6", changes_of_perplexity("a", "b"), against="y")
        results = results_of(("x", 3.0, {}), ("y", 4.0, {}))
        assert render(Table({"x": "x"}, {"c": column}), results).splitlines()[-1] == "| x | -25.0 / -25.0 % |"
        del results["cells"][Cell("y", (), "0.6").key]
        assert render(Table({"x": "x"}, {"c": column}), results) == ""

    def test_cost_is_without_the_evaluation_and_of_cells_that_ran_alone(self):
        plan = {"card": "h100", "tflop": {"calibrate": 2.0, "solve": 1.0, "evaluate": 9.0, "all": 12.0}}
        taken = {"calibrate": 20.0, "solve": 10.0, "evaluate": 90.0}
        columns = {"t": Column("0.6", tflop()), "t solve": Column("0.6", tflop("solve")),
                   "s": Column("0.6", seconds()), "s solve": Column("0.6", seconds("solve"))}  # fmt: skip
        results = results_of(
            ("new", 1.0, {"plan": plan, "seconds": taken, "threads": 2}),
            ("baseline", 1.0, {"plan": None, "seconds": taken, "threads": 2}),
            ("old", 1.0, {"seconds": taken}),
        )
        rows = render(Table({name: name for name in ("new", "baseline", "old")}, columns), results).splitlines()[2:]
        assert rows == ["| new | 3.0 | 1.0 | 30 | 10 |", "| baseline | | | 30 | 10 |"]


class TestTables:
    def test_a_row_is_a_line_in_the_methods(self):
        """Its label has its flags, or says that it is not in the product."""
        assert document_tables.label("Wanda") == "Wanda (`--method wanda`)"
        assert document_tables.label("ADMM") == "ADMM (in `bench/`)"
        assert document_tables.label("masks only (`--refit 0`)") == "masks only (`--refit 0`)"
        assert document_tables.label("the default") == "the default"
        for name in ("perplexity", "reference", "cost"):
            rows = document_tables.TABLES[name].rows
            assert set(document_tables.METHODS_OF_TABLE) <= set(rows.values())

    def test_what_everything_will_fill(self):
        """Once there is a cell with all that a run records, every table of the study has numbers."""
        on_texts = dict.fromkeys((document_tables.WIKIPEDIA, document_tables.NEWS, texts.TEST), 5.0)
        versions = dict.fromkeys(("python", "torch", "transformers"), "1")
        run = {"perplexity": on_texts, "dense": on_texts, "relative_error": 0.5, "seconds": {"solve": 1.0}}
        run |= {"arguments": {"method": "wanda"}}
        run |= {"commit": "abc", "threads": 2, "plan": {"tflop": {"solve": 1.0}}, "versions": versions}
        cells = document_tables.cells_of_everything()
        of_cell = {cell.key: {"pattern": cell.pattern, "calibrated_on": cell.calibrated_on} for cell in cells}
        results = {"cells": {key: run | own for key, own in of_cell.items()}}
        tables = quality_documents.tables_of(results)
        # These two are of options that are no more.
        assert [name for name, table in tables.items() if not table] == ["allocation", "alpha"]
        assert "| 2:4, language reference |" in tables["seeds"]
        assert tables["code"].splitlines()[-1] == f"| abc | 1 | 1 | 1 | 2 | {len(results['cells'])} |"


TABLES = {"one": "| new |\n", "two": "| 2 |\n", "empty": ""}


class TestMarkers:
    def test_a_table_is_made_anew_between_its_markers(self):
        text = "Before\n\n<!-- table: one -->\n\n| old |\n\n<!-- end -->\n\nAfter <!-- end -->\n"
        made = quality_documents.with_tables(text, TABLES)
        assert made == text.replace("old", "new")
        assert quality_documents.with_tables(made, TABLES) == made
        first = "<!-- table: two -->\n<!-- end -->\n"
        assert "| 2 |" in quality_documents.with_tables(first, TABLES)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("<!-- table: one -->\n| old |\n", "no line <!-- end -->"),
            ("<!-- table: one -->\n<!-- table: two -->\n<!-- end -->\n", "no line <!-- end -->"),
            ("<!-- table: three -->\n<!-- end -->\n", "table: three -->: there is no such table"),
            ("<!-- table: empty -->\n<!-- end -->\n", "table: empty -->: .* has no number; there is one, two"),
        ],
    )
    def test_mistakes_are_refused(self, text, match):
        with pytest.raises(ValueError, match=match):
            quality_documents.with_tables(text, TABLES)

    def test_what_stands_nowhere(self):
        text = "<!-- table: two -->\n<!-- end -->\n"
        assert quality_documents.nowhere([text], TABLES) == ["one"]

    def test_documents_are_written(self, tmp_path, monkeypatch):
        page = tmp_path / "page.md"
        page.write_text("<!-- table: readme -->\n| old |\n<!-- end -->\n", encoding="utf-8")
        monkeypatch.setattr(quality_documents, "DOCUMENTS", (page,))
        left = quality_documents.write_documents(load(RESULTS))
        assert "perplexity" in left
        assert "readme" not in left
        assert re.search(r"^\| \*\*the default\*\* \|.* \*\*30\.\d / ", page.read_text(encoding="utf-8"), re.MULTILINE)
