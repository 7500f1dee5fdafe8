"""The quality study: which cells it runs, what it keeps and prints of them, the methods that only it has."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import quality
import quality_curves
import quality_plots
import quality_settings
import torch
from helpers.families import save_model
from helpers.kernel_inputs import DEVICE, gram, normal

import sparsefw.run
from sparsefw.errors import InputError
from sparsefw.kernels.backend import TORCH
from sparsefw.solver import METHODS, PruneConfig, patterns, prune_layers
from sparsefw.solver.choices import CHOOSE
from sparsefw.solver.config import WITH_REFIT


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The benchmark's methods, for the time of a test."""
    for name, method in quality.BASELINES.items():
        monkeypatch.setitem(METHODS, name, method)
        monkeypatch.setitem(CHOOSE, name, quality.CHOOSE_BASELINES[name])


def cells_of(settings=False, only="", wanted=None, seeds=(0,), nsamples=(64,)):
    return quality.select(settings=settings, only=only, wanted=wanted, seeds=seeds, nsamples=nsamples)


def entry(perplexity, **changes):
    """A hand-made cell of the results, as far as tables need it."""
    texts = {"a.txt": perplexity, "b.txt": 2 * perplexity}
    relative = {"relative_mask": 0.5, "relative_error": 0.25, "warm_start": "wanda"}
    return {"perplexity": texts, "dense": dict.fromkeys(texts, 9.0), "seconds": {"solve": 61.4}, **relative, **changes}


class TestCells:
    def test_methods_at_every_pattern(self):
        cells = cells_of(seeds=[0, 3], nsamples=[8, 64])
        assert len({cell.key for cell in cells}) == len(cells) == 4 * 5 * len(quality.METHODS_OF_TABLE)
        assert {cell.pattern for cell in cells} == {"0.5", "0.6", "0.7", "2:4", "4:8"}
        assert {(cell.seed, cell.nsamples) for cell in cells} == {(0, 8), (0, 64), (3, 8), (3, 64)}

    def test_selection(self):
        cells = cells_of(only="ADMM", wanted=["2:4"])
        assert [(cell.method, cell.pattern) for cell in cells] == [("ADMM", "2:4"), ("ADMM + refit", "2:4")]

    def test_settings(self):
        cells = cells_of(settings=True)
        assert len({cell.key for cell in cells}) == len(cells)
        for base in (quality.MASKS, quality.DEFAULT):
            own = [cell for cell in cells if cell.method.startswith(base)]
            varied = [cell.method.removeprefix(f"{base}, ") for cell in own if cell.pattern == "0.6"]
            alphas = {name for name in varied if name.startswith("alpha")}
            # One of the five values is the base's own.
            assert len(alphas) == 4
            assert {"penalty 0", "steps 20", "steps 30", "steps 60", base} <= set(varied)
            # The whole penalty is the default where weights are not refitted.
            assert ("penalty 1" in varied) == (base != quality.MASKS)
            assert [c.method for c in own if c.pattern == "layer:0.6"] == [base]
        assert [c.method for c in cells if "SparseGPT" in c.method] == ["SparseGPT"]

    @pytest.mark.parametrize("settings", [False, True])
    def test_flags_are_those_of_the_command_line(self, settings):
        for cell in cells_of(settings):
            config = quality.config_of([*cell.flags, "--sparsity", cell.pattern])
            assert config.sparsity == cell.pattern
            if cell.method.startswith(quality.MASKS):
                assert config.refit == 0
            if "alpha 0.9" in cell.method:
                assert config.alpha == 0.9

    def test_a_changed_default_is_run_again(self, monkeypatch):
        cells = cells_of(only=quality.DEFAULT, wanted=["0.5", "0.6"])
        results = {"cells": {cells[0].key: {"arguments": quality.resolved(cells[0].flags)}}}
        assert quality.missing(results, cells) == cells[1:]
        monkeypatch.setitem(WITH_REFIT["sparsefw"], "steps", 31)
        assert quality.missing(results, cells) == cells

    def test_settings_of_frank_wolfe_are_nothing_to_other_methods(self):
        """A new setting of Frank-Wolfe does not make cells of other methods run again."""
        assert set(quality.resolved(["--method", "wanda"])) == {"method"}
        assert {"steps", "alpha", "refit", "damp"} <= set(quality.resolved([]))


class TestTable:
    def test_rows(self):
        cells = cells_of(wanted=["0.6"], only="RIA") + cells_of(wanted=["0.6"], only="ADMM + refit")
        found = [entry(1690.04, warm_start="ria"), entry(40.0)]
        results = {"cells": {cell.key: one for cell, one in zip(cells, found, strict=True)}}
        table = quality.tables(results, cells_of())
        assert table.splitlines()[0] == "Sparsity 0.6, 64 calibration windows"
        assert table.splitlines()[2:] == [
            "| method | perplexity, a.txt | perplexity, b.txt | mask only | relative error | seconds |",
            "| --- | --- | --- | --- | --- | --- |",
            "| dense | 9.00 | 9.00 |  |  |  |",
            "| RIA | 1690.04 | 3380.08 |  |  | 61 |",
            "| ADMM + refit | 40.00 | 80.00 | 0.500 | 0.250 | 61 |",
        ]

    def test_a_table_for_each_pattern_and_size(self):
        cells = cells_of(only="RIA", wanted=["0.6", "2:4"], nsamples=[8, 64])
        results = {"cells": {cell.key: entry(10.0) for cell in cells}}
        assert len(quality.tables(results, cells).split("\n\nSparsity ")) == 4
        assert quality.tables({"cells": {}}, cells) == ""

    def test_seeds_are_averaged(self):
        cells = cells_of(only="RIA", wanted=["0.6"], seeds=[0, 1, 2])
        found = [entry(perplexity) for perplexity in (10.0, 11.0, 15.0)]
        results = {"cells": {cell.key: one for cell, one in zip(cells, found, strict=True)}}
        row = quality.tables(results, cells).splitlines()[-1]
        assert row == "| RIA | 12.00 (5.00) | 24.00 (10.00) | 0.500 (0.000) | 0.250 (0.000) | 61 (0) |"


class TestBaselines:
    @pytest.mark.parametrize("method", ["one-swaps", "admm", "admm-refit"])
    @pytest.mark.parametrize("sparsity", ["0.6", "2:4", "4:8"])
    def test_pattern_is_exact(self, method, sparsity):
        """The product runs them, with layers stacked and padded with rows of zeros."""
        pattern, G = patterns.parse(sparsity), gram(24)
        layers = [("q", normal(7, 24)), ("k", normal(5, 24, seed=1))]
        before = [weight.clone() for _, weight in layers]
        rows = list(prune_layers(layers, G, method, PruneConfig(sparsity=sparsity), TORCH))
        for row, (_, weight), dense in zip(rows, layers, before, strict=True):
            group = pattern.group or 24
            kept = 24 - int(0.6 * 24) if not pattern.group else pattern.group // 2
            assert ((weight != 0).view(len(weight), -1, group).sum(2) == kept).all()
            E = (dense - weight).double()
            assert row.error == pytest.approx((E * (E @ G.double())).sum().item(), rel=1e-3)
            assert row.error < row.error_warm_start
            assert torch.equal(weight[weight != 0], dense[weight != 0]) == (method == "one-swaps")

    def test_refit_pays(self):
        error = {}
        for method in ("admm", "admm-refit"):
            layer, G = normal(30, 24), gram(24)
            (row,) = prune_layers([("q", layer)], G, method, PruneConfig(refit=0, damp=0.1), TORCH)
            error[method] = row.error
            assert torch.equal(G, gram(24))
        assert error["admm-refit"] < error["admm"]

    @pytest.mark.parametrize("method", ["one-swaps", "admm", "admm-refit"])
    def test_budget_of_a_layer_is_refused(self, method):
        config = PruneConfig(sparsity="layer:0.6")
        with pytest.raises(InputError, match="same budget in every row"):
            list(prune_layers([("q", normal(7, 24))], gram(24), method, config, TORCH))


def test_committed_results_are_read_and_printed(capsys):
    results = Path(quality.__file__).parents[1] / "results" / "smollm2-quality.json"
    quality.main(["--table", "--results", str(results), "--patterns", "0.6"])
    printed = capsys.readouterr().out
    assert printed.startswith("Sparsity 0.6, 64 calibration windows")
    assert "| the default | 36.37 | 82.44 |" in printed


def test_curves_start_at_the_warm_start_and_fall():
    curves = quality_curves.curves(normal(16, 40).to(DEVICE), gram(40))
    for name, points in curves.items():
        steps, relaxed, rounded = zip(*points, strict=True)
        assert (steps[0], relaxed[0], rounded[0]) == (0, 1, 1)
        assert list(steps) == sorted(set(steps))
        assert rounded[-1] < 0.95
        # The relaxation lies below what it relaxes; the penalty draws them together.
        gap = rounded[-1] - relaxed[-1]
        assert gap > 0.2 if "no penalty" in name else 0 <= gap < 0.1
    assert curves["no penalty, line search"][-1][0] == 200


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    """A cell, the curves and the settings run once; no path of the machine gets into the results."""
    model = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
    texts = [tmp_path / name for name in ("calibration.txt", "test.txt", "other.txt")]
    for n, path in enumerate(texts):
        path.write_text("".join(f"{i}: a rose is a rose is a rose, {(n + i) % 7} times.\n" for i in range(100)))
    results = tmp_path / "results.json"
    ran = []

    def launch(flags):
        ran.append(flags)
        return sparsefw.run.main(flags)

    def run(*flags):
        places = ["--model", str(model), "--results", str(results)]
        size = ["--seqlen", "32", "--eval-windows", "2", "--nsamples", "8"]
        quality.main([*map(str, texts), *places, *size, "--only", "ADMM + refit", *flags], launch)
        return json.loads(results.read_text())

    written = run("--patterns", "2:4", "--curves", "1")
    assert run("--patterns", "2:4", "--curves", "1") == written
    assert len(ran) == 1
    assert list(written["curves"]) == ["1"]
    assert list(written["curves"]["1"]) == ["q_proj", "o_proj", "up_proj", "down_proj"]
    assert not re.search(re.escape(str(tmp_path)) + r"|/tmp|/home|/root", results.read_text())
    (cell,) = written["cells"].values()
    assert list(cell["perplexity"]) == list(cell["dense"]) == ["test.txt", "other.txt"]
    assert {len(column) for column in cell["layers"].values()} == {2 * 7}
    warm, error = (sum(cell["layers"][name]) for name in ("error_warm_start", "error"))
    assert error < warm
    assert 0 < cell["relative_error"] < cell["relative_mask"]
    assert "| ADMM + refit | " in capsys.readouterr().out
    # Settings on the layers of a block, with the smallest sample.
    monkeypatch.setattr(quality_settings, "SAMPLE_ROWS", 2)
    monkeypatch.setattr(quality, "PATTERNS", ("0.5", "2:4"))
    monkeypatch.setattr(quality_settings, "VARIED", {quality_settings.MASKS: {"damp": (0.4,)}})
    settings = run("--patterns", "2:4", "--curves", "", "--settings", "0,1")["settings"]
    assert list(settings) == ["0,1"]
    assert {len(rows) for rows in settings["0,1"].values()} == {2}
    printed = capsys.readouterr().out
    assert "| flags | 0.5, test.txt | 0.5, other.txt | 2:4, test.txt | 2:4, other.txt |" in printed
    assert "| `--refit 0 --damp 0.4` | " in printed
    # Another pattern is another cell, a text with other content another study.
    assert len(run("--patterns", "2:4,0.6", "--curves", "")["cells"]) == len(ran) == 2
    texts[2].write_text("something else")
    with pytest.raises(SystemExit, match="another model, texts or windows"):
        run()


class TestSettings:
    def test_each_is_varied_alone(self):
        """Its default is the row of the base."""
        rows = quality_settings.settings_of_study()
        assert len(set(rows)) == len(rows)
        for base in quality_settings.VARIED:
            before = asdict(quality.config_of(base))
            for flags in (row for row in rows if row[:-2] == base and row not in quality_settings.VARIED):
                after = asdict(quality.config_of(flags))
                assert [f"--{name}" for name in before if before[name] != after[name]] == [flags[-2]]

    def layers(self):
        """Rows of unequal size: a budget for the matrix has something to share out."""
        W = normal(8, 16).cpu() * torch.logspace(-1, 1, 8)[:, None]
        return [(i, "q_proj", W, [gram(16, seed=seed).cpu() for seed in (0, i)]) for i in (1, 2)]

    def test_errors_are_relative_to_wanda_s_mask_on_every_text(self, monkeypatch):
        """With no steps, swaps or refit the mask is Wanda's, and the error 1 on all texts; else it is less on the text
        calibrated on."""
        nothing = ("--refit", "0", "--steps", "0", "--swaps", "0")
        monkeypatch.setattr(quality_settings, "settings_of_study", lambda: [nothing, ("--refit", "0")])
        measured = quality_settings.measure_settings(self.layers(), ["0.5"])
        assert measured["0.5"][" ".join(nothing)] == [1.0, 1.0]
        assert measured["0.5"]["--refit 0"][0] < 1

    def test_a_budget_for_the_matrix_errs_less(self):
        budgets = quality_settings.measure_budgets(self.layers())["q_proj"]
        assert len(budgets) == len(quality_settings.BUDGETS)
        for way in ("--refit 0", "--target layer"):
            assert budgets[f"{way} --sparsity layer:0.6"][0] < budgets[f"{way} --sparsity 0.6"][0] < 1


def test_a_failed_cell_ends_the_study(tmp_path):
    study = quality.Study(tmp_path, tmp_path / "c.txt", [tmp_path / "t.txt"], 32, 2)
    with pytest.raises(SystemExit, match=r"RIA \| 0.6 .*exit status 2"):
        quality.run_cell(cells_of(only="RIA", wanted=["0.6"])[0], study, launch=lambda flags: 2)


def test_plots(tmp_path):
    cells = cells_of(wanted=["2:4"])
    names = [f"model.layers.{i}.mlp.{kind}.weight" for i in range(3) for kind in ("up_proj", "down_proj")]
    columns = {"name": names} | dict.fromkeys(("error", "error_mask", "error_warm_start"), [1.0] * 6)
    found = {cell.key: {"method": cell.method, "layers": columns} for cell in cells}
    curves = {"8": {"q_proj": {"penalty": [[0, 1.0, 1.0], [5, 0.8, 0.9]]}}}
    quality_plots.plot({"cells": found, "curves": curves}, cells, tmp_path / "plots")
    written = {path.name: path.stat().st_size for path in (tmp_path / "plots").iterdir()}
    assert set(written) == {"layers-2-4.png", "steps-block-8.png"}
    assert min(written.values()) > 5000
