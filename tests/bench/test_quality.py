"""The quality study: its command, what it keeps of a run, and the methods that only it has."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import quality
import quality_baselines
import quality_curves
import quality_plots
import quality_run
import quality_settings
import texts
import torch
from helpers.families import save_model
from helpers.kernel_inputs import DEVICE, gram, normal
from quality_cells import OWN, REFERENCE, Cell, config_of, select

import sparsefw
import sparsefw.run
from sparsefw.errors import InputError
from sparsefw.kernels.backend import TORCH
from sparsefw.report import read_report
from sparsefw.solver import METHODS, PruneConfig, patterns, prune_layers
from sparsefw.solver.choices import CHOOSE
from sparsefw.timeline import Span


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The benchmark's methods, for the time of a test."""
    for name, method in quality_baselines.BASELINES.items():
        monkeypatch.setitem(METHODS, name, method)
        monkeypatch.setitem(CHOOSE, name, quality_baselines.CHOOSE_BASELINES[name])


class TestBaselines:
    @pytest.mark.parametrize("method", ["one-swaps", "admm"])
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

    @pytest.mark.parametrize("method", ["one-swaps", "admm"])
    def test_budget_of_a_layer_is_refused(self, method):
        config = PruneConfig(sparsity="layer:0.6")
        with pytest.raises(InputError, match="same budget in every row"):
            list(prune_layers([("q", normal(7, 24))], gram(24), method, config, TORCH))


def test_committed_results_are_read_and_printed(capsys):
    quality.main(["--table", "--patterns", "0.6"])
    printed = capsys.readouterr().out
    assert printed.startswith("Sparsity 0.6, 64 calibration windows")
    assert re.search(r"^\| the default \| \d\d\.\d\d \| \d\d\.\d\d \|", printed, re.MULTILINE)


def test_selection_of_what_is_calibrated_on_the_reference(capsys):
    def selected(*flags):
        return quality._cells(quality._parse(["--table", *flags]))

    assert {(cell.calibrated_on, cell.pattern) for cell in selected("--reference")} == {(REFERENCE, "0.6")}
    assert [cell.method for cell in selected("--reference", "--only", "Wanda")] == ["Wanda"]
    assert len(selected("--only", "Wanda")) > 1
    with pytest.raises(SystemExit):
        selected("--reference", "--patterns", "0.6")
    assert "--reference goes with --only alone" in capsys.readouterr().err


def test_a_plan_runs_nothing(capsys):
    quality.main(["--plan"], launch=None)
    printed = capsys.readouterr().out
    assert re.match(r"\d+ of \d+ cells are to be run\.\n", printed)
    quality.main(["--plan", "--only", "RIA", "--patterns", "0.5,0.6", "--again", "all"], launch=None)
    assert capsys.readouterr().out.startswith("2 of 2 cells")


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
    own = [tmp_path / name for name in ("calibration.txt", "test.txt", "other.txt")]
    for n, path in enumerate(own):
        path.write_text("".join(f"{i}: a rose is a rose is a rose, {(n + i) % 7} times.\n" for i in range(100)))
    results = tmp_path / "results.json"
    ran, spent = [], []

    def launch(flags):
        ran.append(flags)
        status = sparsefw.run.main(flags)
        spent.append(read_report(Path(flags[-1], "report.json")).seconds)
        return status

    def run(*flags):
        places = ["--model", str(model), "--results", str(results)]
        size = ["--seqlen", "32", "--eval-windows", "2", "--nsamples", "8"]
        quality.main([*map(str, own), *places, *size, "--only", "ADMM", *flags], launch)
        return json.loads(results.read_text())

    written = run("--patterns", "2:4", "--curves", "1")
    assert run("--patterns", "2:4", "--curves", "1") == written
    assert len(ran) == 1
    assert list(written["curves"]) == ["1"]
    assert list(written["curves"]["1"]) == ["q_proj", "o_proj", "up_proj", "down_proj"]
    assert not re.search(re.escape(str(tmp_path)) + r"|/tmp|/home|/root", results.read_text())
    (cell,) = written["cells"].values()
    assert list(cell["perplexity"]) == list(cell["dense"]) == ["test.txt", "other.txt", texts.TEST]
    assert written["study"]["reference"]["python"] == cell["versions"]["python"]
    assert cell["seconds"] == pytest.approx(spent[0])
    assert (cell["commit"], cell["threads"]) == (quality_run.code_version(), torch.get_num_threads())
    # The plan does not know what ADMM does.
    assert {len(column) for column in cell["layers"].values()} == {2 * 7}
    warm, error = (sum(cell["layers"][name]) for name in ("error_warm_start", "error"))
    assert error < warm
    assert 0 < cell["relative_error"] < cell["relative_mask"]
    assert "| ADMM | " in capsys.readouterr().out
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
    # Other code may have made a cell; it is run again where that is asked for.
    written = json.loads(results.read_text())
    (first, _) = written["cells"].values()
    first["commit"] = "abc"
    results.write_text(json.dumps(written))
    run("--patterns", "2:4,0.6", "--curves", "")
    assert len(ran) == 2
    again = run("--patterns", "2:4,0.6", "--curves", "", "--again", "all")["cells"]
    assert len(ran) == 3
    assert {entry["commit"] for entry in again.values()} == {quality_run.code_version()}
    own[2].write_text("something else")
    with pytest.raises(SystemExit, match="another model, texts or windows"):
        run()


class TestSettings:
    def test_each_is_varied_alone(self):
        """Its default is the row of the base."""
        rows = quality_settings.settings_of_study()
        assert len(set(rows)) == len(rows)
        for base in quality_settings.VARIED:
            before = asdict(config_of(base))
            for flags in (row for row in rows if row[:-2] == base and row not in quality_settings.VARIED):
                after = asdict(config_of(flags))
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
        for way in ("--refit 0", "--target layer --reconstruct 0"):
            assert budgets[f"{way} --sparsity layer:0.6"][0] < budgets[f"{way} --sparsity 0.6"][0] < 1


@pytest.fixture
def study(tmp_path):
    """A study of a model and texts that nothing reads."""
    reference = texts.write_reference(tmp_path)
    for name in ("c.txt", "t.txt"):
        (tmp_path / name).write_text(name)
    return quality_run.Study(tmp_path, tmp_path / "c.txt", [tmp_path / "t.txt"], reference, 32, 2)


class TestRun:
    def flags_of(self, cell, study, monkeypatch):
        """The flags of the cell's run, by name."""
        ran = []
        with pytest.raises(SystemExit):
            quality_run.run_cell(cell, study, study.model, launch=lambda flags: ran.extend(flags) or 1)
        found = {}
        for name, value in zip(ran[::2], ran[1::2], strict=True):
            found.setdefault(name, []).append(Path(value).name)
        return found

    def test_a_failed_cell_ends_the_study(self, study, monkeypatch):
        with pytest.raises(SystemExit, match=r"RIA \| 0.6 .*exit status 2"):
            quality_run.run_cell(select(only="RIA", wanted=["0.6"])[0], study, study.model, launch=lambda flags: 2)

    def test_an_unfinished_cell_stays_for_its_commit(self, study, monkeypatch):
        for name, value in {"read_report": None, "entry": {}}.items():
            monkeypatch.setattr(quality_run, name, lambda *args, value=value: value)
        cell, other = select(only="RIA", wanted=["0.6", "2:4"])
        study = replace(study, work=study.model / "work")

        def run(commit, status, cell=cell, saved=True):
            """Run the cell; returns whether it goes on with one that was begun, or nothing if none is run."""
            found = []

            def launch(flags):
                begun = Path(flags[-1]).with_name("begun")
                found.append(begun.exists())
                begun.touch()
                if not status:
                    Path(flags[-1]).mkdir()
                return status

            monkeypatch.setattr(quality_run, "code_version", lambda: commit)
            ended = status == 0 and saved
            with nullcontext() if ended else pytest.raises(SystemExit), quality_run.folder_of(cell, study) as folder:
                assert quality_run.run_cell(cell, study, folder, launch)["commit"] == commit
                if not saved:
                    sys.exit("the results cannot be written")
            return found

        assert run("abc", 1) == [False]
        assert run("def", 1) == [False]
        assert run("abc", 1, other) == [False]
        assert run("abc", 0) == [True]
        # It has ended, and the two others have not.
        assert run("abc", 1) == [False]
        assert run("def", 0) == run("abc", 0, other) == [True]
        # A finished run is not made again because its entry was not saved.
        assert run("abc", 0, saved=False) == [True]
        assert run("abc", 0) == []
        assert not any(study.work.iterdir())

    @pytest.mark.parametrize("commit", ["abc+", "unknown"])
    def test_code_of_no_commit_keeps_no_cell(self, commit, study, monkeypatch):
        monkeypatch.setattr(quality_run, "code_version", lambda: commit)
        (cell,), work = select(only="RIA", wanted=["0.6"]), study.model / "w"
        with pytest.raises(SystemExit, match="not that of one"), quality_run.folder_of(cell, replace(study, work=work)):
            pass
        assert not work.exists()

    def test_seconds_of_an_interrupted_run(self):
        """Blocks have those of the run that pruned them, which another lane than the main one takes no part in."""
        spans = [Span(0, "main", "solve", 0, 7), Span(None, "main", "embed", 7, 8), Span(None, "main", "embed", 8, 10)]
        spans.append(Span(None, "read", "read", 0, 9))
        blocks = [SimpleNamespace(seconds={"solve": 2.0, "forward": 1.0}), SimpleNamespace(seconds={"solve": 3.0})]
        seconds = quality_run.seconds_of_all_parts(SimpleNamespace(timeline=spans, blocks=blocks))
        assert seconds == {"embed": 3.0, "solve": 5.0, "forward": 1.0}

    def test_texts_of_a_cell(self, study, monkeypatch):
        """The reference is evaluated on, but not where a setting is chosen; its other part may be calibrated on."""
        cells = [Cell("RIA", ("--method", "ria"), "0.6", calibrated_on=on) for on in (OWN, REFERENCE)]
        cells.append(Cell("RIA", ("--method", "ria"), "0.6", tuning=True))
        found = [self.flags_of(cell, study, monkeypatch) for cell in cells]
        assert [flags["--dataset"] for flags in found] == [["c.txt"], [texts.CALIBRATION], ["c.txt"]]
        assert [flags["--eval"] for flags in found] == [["t.txt", texts.TEST], ["t.txt", texts.TEST], ["t.txt"]]

    def test_results_without_the_reference_go_on(self, study):
        header = study.header()
        study.check({})
        study.check(header)
        study.check({name: value for name, value in header.items() if name != "reference"})
        with pytest.raises(ValueError, match="another model, texts or windows"):
            study.check(header | {"seqlen": 64})
        with pytest.raises(ValueError, match=r"reference of Python 3\.1, not 3\."):
            study.check(header | {"reference": {"python": "3.1"}})

    def test_commit_of_a_changed_tree_has_a_mark(self, tmp_path, monkeypatch):
        root = tmp_path / "checkout"
        for folder in ("sparsefw", "bench/quality", "bench/results"):
            (root / folder).mkdir(parents=True)
            (root / folder / "file").write_text("1")

        def git(*command):
            names = ["-c", "user.name=n", "-c", "user.email=e"]
            return subprocess.run(
                ["git", "-C", root, *names, *command], check=True, capture_output=True, text=True
            ).stdout

        git("init", "-q")
        git("add", ".")
        git("commit", "-qm", "first")
        monkeypatch.setattr(quality_run, "__file__", str(root / "bench" / "quality" / "file"))
        monkeypatch.setattr(sparsefw, "__file__", str(root / "sparsefw" / "file"))
        commit = quality_run.code_version()
        assert git("rev-parse", "HEAD").startswith(commit)
        assert len(commit) == 12
        # Results are not code.
        (root / "bench/results/file").write_text("2")
        assert quality_run.code_version() == commit
        (root / "sparsefw" / "new").write_text("2")
        assert quality_run.code_version() == commit + "+"
        # The package comes from another checkout than the bench.
        git("clone", "-q", ".", str(tmp_path / "other"))
        monkeypatch.setattr(sparsefw, "__file__", str(tmp_path / "other" / "sparsefw" / "file"))
        assert quality_run.code_version() == "unknown"


def test_plots(tmp_path):
    cells = select(wanted=["2:4"])
    names = [f"model.layers.{i}.mlp.{kind}.weight" for i in range(3) for kind in ("up_proj", "down_proj")]
    columns = {"name": names} | dict.fromkeys(("error", "error_mask", "error_warm_start"), [1.0] * 6)
    found = {cell.key: {"method": cell.method, "layers": columns} for cell in cells}
    curves = {"8": {"q_proj": {"penalty": [[0, 1.0, 1.0], [5, 0.8, 0.9]]}}}
    quality_plots.plot({"cells": found, "curves": curves}, cells, tmp_path / "plots")
    written = {path.name: path.stat().st_size for path in (tmp_path / "plots").iterdir()}
    assert set(written) == {"layers-2-4.png", "steps-block-8.png"}
    assert min(written.values()) > 5000
